"""Rules between sections, checked before anything starts.

Each broken rule is one sentence: dotted field, value, rule, nearest value that would do. All that is broken is
reported at once. Rules inside one section stand in schema.py; whether the longest sample fits the token budget
is known only to the plan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import ConfigError, UserError

if TYPE_CHECKING:
    from grn_scale.data.schema import DatasetInfo


def check_set(config: Config, *fields: str) -> None:
    """ConfigError unless each dotted field (text) holds something."""
    problems = []
    for name in fields:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if not value:
            problems.append(f"{name} is not set: give {name}=VALUE, or write it in the run file")
    _refuse(problems)


def check_output(folder: str | Path) -> None:
    """UserError unless the folder can be made or written to, as far as can be seen without writing."""
    folder = Path(folder).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise UserError(f"output: {nearest} is a file; give a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output: {nearest} cannot be written to; give another folder, or change its permissions")


def check_layout(config: Config, world_size: int) -> None:
    """ConfigError unless the model, the global batch and the degrees of parallelism fit `world_size` processes."""
    _refuse([*_tensor_rules(config), *_context_rules(config), *_pipeline_rules(config),
             *_world_rules(config, world_size), *_zero_rules(config), *_kernel_rules(config)])


def check_training(config: Config, dataset: DatasetInfo) -> None:
    """ConfigError unless the model fits the labels and text features of the dataset."""
    pairs = [("latent_channels", dataset.latent_channels), ("rounds", dataset.rounds)]
    if isinstance(config.model, ModelConfig):  # a class-to-image model reads no text
        pairs += [("text_hidden_size", dataset.text_hidden_size), ("task_tags", dataset.task_tags)]
    where = config.data.dataset or "the dataset"
    _refuse(
        f"model.{name} is {_plain(getattr(config.model, name))}, but {where} was tokenized with {_plain(value)}: "
        f"set model.{name}={_plain(value)}, or tokenize anew"
        for name, value in pairs if getattr(config.model, name) != value)


def _refuse(problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        raise ConfigError("\n".join(problems))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest(value: int, legal: Iterable[int]) -> int:
    """The legal value closest to `value`, the smaller of two that are equally close."""
    return min(legal, key=lambda candidate: (abs(candidate - value), candidate))


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, _nearest(value, (value // of * of, (value // of + 1) * of)))


def _tensor_rules(config: Config) -> Iterator[str]:
    """What tensor parallelism cuts must come out even: heads, label channels, MLP width, and the sequence."""
    degree, model = config.parallel.tensor, config.model
    cut = {"model.num_heads": model.num_heads, "model.ffn_hidden_size": model.ffn_hidden_size,
           "the labels of a token (model.latent_channels x rounds)" if model.label_form == "bit"
           else "the labels of a token (model.latent_channels)": model.label_channels}
    legal = _nearest(degree, _divisors(math.gcd(*cut.values())))
    for name, value in cut.items():
        if value % degree:
            yield (f"parallel.tensor is {degree}, but must divide {name} ({value}): "
                   f"parallel.tensor={legal} is the nearest that fits this model")
    parts = (degree if config.parallel.sequence else 1) * config.parallel.context
    budget = config.data.token_budget
    if budget % parts:
        yield (f"data.token_budget is {budget}, but parallel.sequence (with parallel.tensor) and parallel.context cut "
               f"it into {parts} equal parts: data.token_budget={_nearest_multiple(budget, math.lcm(128, parts))} is "
               "the nearest that fits")


def _context_rules(config: Config) -> Iterator[str]:
    """In attention each process of the context works on whole heads, so every one needs some."""
    degree, heads = config.parallel.context, config.model.num_heads // config.parallel.tensor
    if degree > max(1, heads):
        yield (f"parallel.context is {degree}, but a tensor-parallel rank has {heads} heads to share out "
               f"(model.num_heads {config.model.num_heads} / parallel.tensor {config.parallel.tensor}): "
               f"parallel.context={max(1, heads)} is the nearest that fits")


def _pipeline_rules(config: Config) -> Iterator[str]:
    pipeline, virtual, layers = config.parallel.pipeline, config.parallel.virtual_pipeline, config.model.num_layers
    if virtual > 1 and pipeline == 1:
        yield (f"parallel.virtual_pipeline is {virtual}, but parallel.pipeline is 1 and there is nothing to "
               f"interleave: set parallel.virtual_pipeline=1, or parallel.pipeline=2 or more")
    if layers % (pipeline * virtual):
        if pipeline <= layers and layers % pipeline == 0:
            remedy = f"parallel.virtual_pipeline={_nearest(virtual, _divisors(layers // pipeline))}"
        else:
            remedy = f"parallel.pipeline={_nearest(pipeline, _divisors(layers))} parallel.virtual_pipeline=1"
        yield (f"parallel.pipeline x parallel.virtual_pipeline is {pipeline} x {virtual}, but must divide "
               f"model.num_layers ({layers}): {remedy} is the nearest that fits")


def _world_rules(config: Config, world_size: int) -> Iterator[str]:
    parallel, packs = config.parallel, config.data.packs_per_step
    one_model = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % one_model:
        yield (f"the job has {world_size} processes, but those that read the same packs are parallel.tensor x "
               f"parallel.pipeline x parallel.context = {parallel.tensor} x {parallel.pipeline} x {parallel.context} = "
               f"{one_model}: start "
               f"{_nearest_multiple(world_size, one_model)} processes, or lower the degrees")
        return
    data = world_size // one_model
    if packs % data:
        yield (f"data.packs_per_step is {packs}, but must be a multiple of the {data} data-parallel ranks "
               f"({world_size} processes / {one_model}): "
               f"data.packs_per_step={_nearest_multiple(packs, data)} is the nearest that fits")
    elif parallel.virtual_pipeline > 1 and (packs // data) % parallel.pipeline:
        yield (f"data.packs_per_step is {packs}, {packs // data} for each of {data} data-parallel ranks, but "
               f"parallel.virtual_pipeline > 1 needs a multiple of parallel.pipeline ({parallel.pipeline}) for each: "
               f"data.packs_per_step={_nearest_multiple(packs, data * parallel.pipeline)} is the nearest that fits")
    else:
        yield from _ramp_rules(config, data)


def _ramp_rules(config: Config, data: int) -> Iterator[str]:
    """Every size of the global batch is a multiple of the first, so it is enough that the first one fits."""
    parallel, start, packs = config.parallel, config.data.ramp_start, config.data.packs_per_step
    unit = data * (parallel.pipeline if parallel.virtual_pipeline > 1 else 1)
    if start % unit:
        legal = _nearest(start, (size for size in _divisors(packs) if size % unit == 0))
        of = f"the {data} data-parallel ranks"
        if unit > data:
            of = f"{data} data-parallel ranks x parallel.pipeline ({parallel.pipeline}, with virtual stages)"
        yield (f"data.ramp_start is {start}, but must be a multiple of {of} and divide data.packs_per_step ({packs}): "
               f"data.ramp_start={legal} is the nearest that fits")


def _zero_rules(config: Config) -> Iterator[str]:
    if config.zero.stage >= 2 and config.parallel.pipeline > 1:
        yield (f"zero.stage is {config.zero.stage} with parallel.pipeline={config.parallel.pipeline}, but stages 2 and "
               "3 reduce gradients in every backward pass, which a pipeline schedule interleaves: set zero.stage=1, or "
               "parallel.pipeline=1")
    if config.zero.stage == 0 and config.train.precision == "bf16":
        yield ("zero.stage is 0 with train.precision bf16, but DeepSpeed keeps fp32 masters and accumulates in fp32 "
               "only where it shards the optimizer: set zero.stage=1, or train.precision=fp32")


def _kernel_rules(config: Config) -> Iterator[str]:
    if config.kernels.cross_entropy != "torch" and config.model.label_form == "bit":
        yield (f"kernels.cross_entropy is {config.kernels.cross_entropy} with model.label_form=bit, but two classes "
               "need a softplus and no softmax: set kernels.cross_entropy=torch")

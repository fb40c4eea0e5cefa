"""Rules between sections, checked before anything starts.

Each broken rule is one sentence: dotted field, value, rule, nearest value that would do. All that is broken is
reported at once. Rules inside one section stand in schema.py; whether the longest sample fits the token budget
is known only to the plan.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import ConfigError, UserError

if TYPE_CHECKING:
    from grn_scale.data.schema import DatasetInfo

WORLD = "the number of processes"


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
    """ConfigError unless the model, the global batch and the degrees of parallelism fit `world_size` processes.

    Each rule judges what the remedies named before would make, so that following all of them gives a legal layout.
    """
    problems = []
    for rules in (_zero_rules, _tensor_rules, _context_rules, _budget_rules, _pipeline_rules, _world_rules,
                  _packs_rules, _ramp_rules, _kernel_rules):
        broken = list(rules(config, world_size))
        problems += [each.text for each in broken]
        for each in broken:
            config, world_size = each.remedied(config, world_size)
    _refuse(problems)


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


@dataclass(frozen=True)
class Broken:
    text: str
    """Field, value, rule and remedy."""
    remedy: Mapping[str, object]
    """Dotted field (or WORLD) -> the value that the text names first."""

    def remedied(self, config: Config, world_size: int) -> tuple[Config, int]:
        """Both with the remedy."""
        sections: dict[str, dict[str, object]] = {}
        for name, value in self.remedy.items():
            section, _, field = name.partition(".")
            sections.setdefault(section, {})[field] = value
        world_size = sections.pop(WORLD, {"": world_size})[""]
        return replace(config, **{name: replace(getattr(config, name), **values)
                                  for name, values in sections.items()}), world_size


def _zero_rules(config: Config, world_size: int) -> Iterator[Broken]:
    zero, pipeline = config.zero, config.parallel.pipeline
    if zero.stage >= 2 and pipeline > 1:
        remedy, words = {"zero.stage": 1}, "zero.stage=1"
        if zero.offload_optimizer:
            remedy, words = {**remedy, "zero.offload_optimizer": False}, f"{words} zero.offload_optimizer=false"
        yield Broken(f"zero.stage is {zero.stage} with parallel.pipeline={pipeline}, but stages 2 and 3 reduce "
                     f"gradients in every backward pass, which a pipeline schedule interleaves: set {words}, or "
                     "parallel.pipeline=1", remedy)
    if zero.stage == 0 and config.train.precision == "bf16":
        yield Broken("zero.stage is 0 with train.precision bf16, but DeepSpeed keeps fp32 masters and accumulates in "
                     "fp32 only where it shards the optimizer: set zero.stage=1, or train.precision=fp32",
                     {"zero.stage": 1})


def _tensor_rules(config: Config, world_size: int) -> Iterator[Broken]:
    """What tensor parallelism cuts must come out even: heads, label channels and MLP width."""
    degree, model = config.parallel.tensor, config.model
    cut = {"model.num_heads": model.num_heads, "model.ffn_hidden_size": model.ffn_hidden_size,
           "the labels of a token (model.latent_channels x rounds)" if model.label_form == "bit"
           else "the labels of a token (model.latent_channels)": model.label_channels}
    legal = _nearest(degree, _divisors(math.gcd(*cut.values())))
    for name, value in cut.items():
        if value % degree:
            yield Broken(f"parallel.tensor is {degree}, but must divide {name} ({value}): "
                         f"parallel.tensor={legal} is the nearest that fits this model", {"parallel.tensor": legal})


def _context_rules(config: Config, world_size: int) -> Iterator[Broken]:
    """In attention each process of the context works on whole heads, so every one needs some."""
    degree, heads = config.parallel.context, max(1, config.model.num_heads // config.parallel.tensor)
    if degree > heads:
        yield Broken(f"parallel.context is {degree}, but a tensor-parallel rank has {heads} heads to share out "
                     f"(model.num_heads {config.model.num_heads} / parallel.tensor {config.parallel.tensor}): "
                     f"parallel.context={heads} is the nearest that fits", {"parallel.context": heads})


def _budget_rules(config: Config, world_size: int) -> Iterator[Broken]:
    """Sequence and context parallelism cut a pack into equal parts."""
    parallel, budget = config.parallel, config.data.token_budget
    parts = (parallel.tensor if parallel.sequence else 1) * parallel.context
    if budget % parts:
        legal = _nearest_multiple(budget, math.lcm(128, parts))
        yield Broken(f"data.token_budget is {budget}, but parallel.sequence (with parallel.tensor) and "
                     f"parallel.context cut it into {parts} equal parts: data.token_budget={legal} is the nearest "
                     "that fits", {"data.token_budget": legal})


def _pipeline_rules(config: Config, world_size: int) -> Iterator[Broken]:
    pipeline, virtual, layers = config.parallel.pipeline, config.parallel.virtual_pipeline, config.model.num_layers
    if virtual > 1 and pipeline == 1:
        yield Broken(f"parallel.virtual_pipeline is {virtual}, but parallel.pipeline is 1 and there is nothing to "
                     "interleave: set parallel.virtual_pipeline=1, or parallel.pipeline=2 or more",
                     {"parallel.virtual_pipeline": 1})
    elif layers % (pipeline * virtual):
        if layers % pipeline == 0:
            remedy = {"parallel.virtual_pipeline": _nearest(virtual, _divisors(layers // pipeline))}
        else:
            remedy = {"parallel.pipeline": _nearest(pipeline, _divisors(layers)), "parallel.virtual_pipeline": 1}
        words = " ".join(f"{name}={value}" for name, value in remedy.items())
        yield Broken(f"parallel.pipeline x parallel.virtual_pipeline is {pipeline} x {virtual}, but must divide "
                     f"model.num_layers ({layers}): {words} is the nearest that fits", remedy)


def _world_rules(config: Config, world_size: int) -> Iterator[Broken]:
    parallel, one_model = config.parallel, _one_model(config)
    if world_size % one_model:
        legal = _nearest_multiple(world_size, one_model)
        yield Broken(f"the job has {world_size} processes, but those that read the same packs are parallel.tensor x "
                     f"parallel.pipeline x parallel.context = {parallel.tensor} x {parallel.pipeline} x "
                     f"{parallel.context} = {one_model}: start {legal} processes, or lower the degrees", {WORLD: legal})


def _packs_rules(config: Config, world_size: int) -> Iterator[Broken]:
    packs, data = config.data.packs_per_step, world_size // _one_model(config)
    unit = _packs_unit(config, world_size)
    if packs % unit == 0:
        return
    legal = _nearest_multiple(packs, unit)
    remedy = {"data.packs_per_step": legal}
    if config.data.ramp_start and legal % config.data.ramp_start:
        remedy["data.ramp_start"] = _nearest(config.data.ramp_start, (d for d in _divisors(legal) if d % unit == 0))
    words = " ".join(f"{name}={value}" for name, value in remedy.items())
    if packs % data:
        yield Broken(f"data.packs_per_step is {packs}, but must be a multiple of {_unit_words(config, world_size)}: "
                     f"{words} is the nearest that fits", remedy)
    else:
        pipeline = config.parallel.pipeline
        yield Broken(f"data.packs_per_step is {packs}, {packs // data} for each of {data} data-parallel ranks, but "
                     f"parallel.virtual_pipeline > 1 needs a multiple of parallel.pipeline ({pipeline}) for each: "
                     f"{words} is the nearest that fits", remedy)


def _ramp_rules(config: Config, world_size: int) -> Iterator[Broken]:
    """Every size of the global batch is a multiple of the first, so it is enough that the first one fits."""
    start, packs, unit = config.data.ramp_start, config.data.packs_per_step, _packs_unit(config, world_size)
    if start % unit:
        legal = _nearest(start, (size for size in _divisors(packs) if size % unit == 0))
        yield Broken(f"data.ramp_start is {start}, but must be a multiple of {_unit_words(config, world_size)} and "
                     f"divide data.packs_per_step ({packs}): data.ramp_start={legal} is the nearest that fits",
                     {"data.ramp_start": legal})


def _kernel_rules(config: Config, world_size: int) -> Iterator[Broken]:
    if config.kernels.cross_entropy != "torch" and config.model.label_form == "bit":
        yield Broken(f"kernels.cross_entropy is {config.kernels.cross_entropy} with model.label_form=bit, but two "
                     "classes need a softplus and no softmax: set kernels.cross_entropy=torch",
                     {"kernels.cross_entropy": "torch"})
    if config.kernels.adamw != "torch" and config.zero.offload_optimizer:
        yield Broken(f"kernels.adamw is {config.kernels.adamw}, which updates on a GPU, but "
                     "zero.offload_optimizer=true updates on the CPU: set kernels.adamw=torch",
                     {"kernels.adamw": "torch"})


def _one_model(config: Config) -> int:
    """Processes that read the same packs."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def _packs_unit(config: Config, world_size: int) -> int:
    """What a global batch must be a multiple of: virtual stages take the micro-batches of a rank in rounds."""
    pipeline = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
    return world_size // _one_model(config) * pipeline


def _unit_words(config: Config, world_size: int) -> str:
    data = world_size // _one_model(config)
    if config.parallel.virtual_pipeline > 1:
        return f"{data} data-parallel ranks x parallel.pipeline ({config.parallel.pipeline}, with virtual stages)"
    return f"the {data} data-parallel ranks ({world_size} processes / {_one_model(config)})"

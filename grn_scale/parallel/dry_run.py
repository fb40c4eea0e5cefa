"""A layout tried without its processes: one rank of each kind is built and takes a step that computes nothing.

Tensor- and data-parallel ranks of a pipeline stage have tensors of equal shapes, so one rank stands for all of them.
Each runs the code of training (the engine, megatron's schedule, DeepSpeed) in a process of its own, in a world that has
its size only in name; `dry_step.py` is that process.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from grn_scale.config.check import check_layout
from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.model.transformer import GRN
from grn_scale.parallel.dims import Coordinate, Dims
from grn_scale.parallel.fake_world import fake_environment

CATEGORIES = {
    "weights": "what the network computes with",
    "gradients": "accumulated over micro-batches",
    "optimizer": "this rank's share of fp32 masters and moments",
    "average": "its share of the moving average",
    "batches": "labels and text states of the step's packs",
    "buffers": "what else is held when backward is done: gathered rows, gradients on their way",
    "activations": "the most that came and went in forward and backward",
    "peak": "the most that was held at once in the step",
}
"""Categories of bytes of a rank, and what they mean. All but the peak add up to the peak, unless that is reached in the
update."""
AT_ONCE = 2
"""Processes that run beside each other, about 1 GB each."""


@dataclass(frozen=True)
class RankClass:
    """One rank after its dry step, and what it stands for."""

    stage: int
    """Pipeline stage."""
    rank: int
    """The rank that ran: the stage's first."""
    ranks: int
    """How many it stands for."""
    parameters: int
    """That this rank holds."""
    tensors: dict[str, int]
    """Official name -> elements that the stage's tensor-parallel ranks hold, copies counted once."""
    bytes: dict[str, int]
    """By category (`CATEGORIES`)."""
    micro_batches: int
    """That were run: those of a step, or as many as fill the pipeline."""
    seconds: float


@dataclass(frozen=True)
class DryRun:
    classes: tuple[RankClass, ...]
    """By pipeline stage."""
    parameters: int
    """Of the whole model: added up over the stages, replicated tensors counted once."""
    differences: tuple[str, ...]
    """Tensors of which the stages together hold more or less than the plain model has; empty where the layout is whole.
    """


def check_dry_run(config: Config, world_size: int) -> None:
    """ConfigError unless the layout is legal and one that can be tried."""
    check_layout(config, world_size)
    if not isinstance(config.model, ModelConfig):
        raise ConfigError("the model is a class-to-image model, which every process holds whole: there is no layout to "
                          "try; name a text/video model, e.g. model=configs/model/grn_2b.yaml")
    if config.zero.stage == 3:
        raise ConfigError("zero.stage is 3, but a dry run needs weights that stay in place, and stage 3 frees and "
                          "gathers them around every layer: try the layout with zero.stage=2, which holds about "
                          "the same but for the weights (stage 3 divides them by the data-parallel size)")
    if config.zero.offload_optimizer:
        raise ConfigError("zero.offload_optimizer is true, but a dry run counts one memory: try the layout with "
                          "zero.offload_optimizer=false, and take the optimizer's bytes for host memory")


def dry_run(config: Config, world_size: int, done: Callable[[], object] = lambda: None) -> DryRun:
    """Build, shard and step one rank of every pipeline stage; `done` is called after each.

    ConfigError where the layout is illegal or cannot be tried, UserError where a rank fails (its error is on stderr).
    """
    check_dry_run(config, world_size)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        running = [threads.submit(_run_stage, config, world_size, stage) for stage in range(config.parallel.pipeline)]
        try:
            for finished in as_completed(running):
                finished.result()
                done()
        finally:
            threads.shutdown(cancel_futures=True)
    classes = tuple(future.result() for future in running)
    return DryRun(classes, *_add_up(config.model, classes))


def _run_stage(config: Config, world_size: int, stage: int) -> RankClass:
    parallel = config.parallel
    dims = Dims.of_world(world_size, parallel.tensor, parallel.pipeline, parallel.context)
    # Of uneven heads the first context-parallel rank has most.
    rank = dims.rank(Coordinate(0, 0, 0, stage))
    # a GPU's kernels and their libraries need not be here
    config = dataclasses.replace(config, kernels=KernelsConfig())
    done = subprocess.run([sys.executable, "-m", f"{__package__}.dry_step"], input=json.dumps(to_dict(config)),
                          stdout=subprocess.PIPE, text=True, check=False, env=fake_environment(rank, world_size))
    if done.returncode:
        raise UserError(f"the dry run of pipeline stage {stage} (rank {rank} of {world_size}) ended with exit code "
                        f"{done.returncode}; its own error stands above (-9: killed, most likely for its memory)")
    return RankClass(stage, rank, world_size // parallel.pipeline, **json.loads(done.stdout))


def _add_up(model: ModelConfig, classes: Sequence[RankClass]) -> tuple[int, tuple[str, ...]]:
    """Parameters of all stages, and where they differ from the plain model's."""
    with torch.device("meta"):
        expected = {name: parameter.numel() for name, parameter in GRN(model).named_parameters()}
    held: dict[str, int] = dict.fromkeys(expected, 0)
    for each in classes:
        for name, count in each.tensors.items():
            held[name] = held.get(name, 0) + count
    differences = tuple(f"{name}: the stages hold {count} elements, the model has {expected.get(name, 0)}"
                        for name, count in held.items() if count != expected.get(name, 0))
    return sum(held.values()), differences

"""Pipeline schedules as megatron-core runs them, task by task.

1F1B (PipeDream-Flush; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", section 2.2.1) and interleaved 1F1B (section 2.2.2). The orders are those of megatron-core 0.16,
pipeline_parallel/schedules.py, with micro-batches in groups of the pipeline's size, its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from grn_scale.errors import ConfigError


class Task(NamedTuple):
    """Forward or backward pass of one micro-batch through one of a stage's chunks of layers."""

    stage: int
    backward: bool
    chunk: int
    micro_batch: int


@dataclass(frozen=True)
class Schedule:
    """`micro_batches` through `pipeline` stages of `virtual` chunks each; chunk c of stage s holds part
    c * pipeline + s of the model.

    ConfigError for what megatron-core refuses: chunks without a pipeline, or micro-batches that do not come in whole
    groups of `pipeline` where there are chunks.
    """

    pipeline: int
    virtual: int
    micro_batches: int

    def __post_init__(self) -> None:
        for name, value in (("pipeline stages", self.pipeline), ("chunks of a stage", self.virtual),
                            ("micro-batches", self.micro_batches)):
            if value < 1:
                raise ConfigError(f"{name}: {value}, but there must be at least 1")
        if self.virtual > 1 and self.pipeline == 1:
            raise ConfigError(f"{self.virtual} chunks a stage, but a single stage has nothing to interleave: take 1 "
                              "chunk, or 2 stages or more")
        if self.virtual > 1 and self.micro_batches % self.pipeline:
            down = self.micro_batches // self.pipeline * self.pipeline
            near = " or ".join(str(count) for count in (down, down + self.pipeline) if count)
            raise ConfigError(f"{self.micro_batches} micro-batches, but the interleaved schedule takes a multiple of "
                              f"the {self.pipeline} stages: take {near}, or 1 chunk a stage")

    @property
    def bubble(self) -> float:
        """Idle time of a stage over its work where all tasks take equally long: (p - 1) / (v m) (Narayanan et al.
        2021, section 2.2.2; with v = 1 section 2.2.1)."""
        return (self.pipeline - 1) / (self.virtual * self.micro_batches)

    def of_stage(self, stage: int) -> list[Task]:
        """What a stage runs, in its order: forward passes of the warm-up, then one forward and one backward pass in
        turn, then the backward passes that are left."""
        forward = [(chunk, micro_batch) for first in range(0, self.micro_batches, self._group)
                   for chunk in range(self.virtual)
                   for micro_batch in range(first, min(first + self._group, self.micro_batches))]
        warm_up = self.warm_up(stage)
        tasks = [Task(stage, False, *each) for each in forward[:warm_up]]
        for i in range(len(forward)):
            if warm_up + i < len(forward):
                tasks.append(Task(stage, False, *forward[warm_up + i]))
            chunk, micro_batch = forward[i]
            tasks.append(Task(stage, True, self.virtual - 1 - chunk, micro_batch))
        return tasks

    def warm_up(self, stage: int) -> int:
        """Forward passes of a stage before its forward and backward passes alternate (megatron-core:
        get_pp_rank_microbatches)."""
        later = self.pipeline - stage - 1
        passes = later if self.virtual == 1 else 2 * later + (self.virtual - 1) * self._group
        return min(passes, self.virtual * self.micro_batches)

    @property
    def _group(self) -> int:
        return self.pipeline if self.virtual > 1 else self.micro_batches

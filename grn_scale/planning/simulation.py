"""Steps of a large job, replayed: packs of different cost, ranks of different speed, all waiting at the step's end.

Copies of the model (replicas) run their pipelines independently; the reduction of gradients waits for the last stage of
the last replica. The ranks of one stage (tensor and context parallel) wait for each other in every layer, so a stage is
as slow as the slowest of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from grn_scale.errors import ConfigError
from grn_scale.keyed import hash64, key64, uniforms
from grn_scale.planning.schedule import Schedule, Task
from grn_scale.planning.schedule_replay import Observer, replay

MOST_RANKS = 1 << 20
MOST_PASSES = 1 << 20
"""Of one pipeline in a step: half a minute."""
BLOCK_VALUES = 1 << 24
"""Of packs and speeds that are replayed at once; bounds the memory."""


@dataclass(frozen=True)
class Job:
    """A layout and its times in seconds. ConfigError for what cannot be."""

    schedule: Schedule
    ranks: int
    ranks_per_stage: int
    """Tensor times context parallel ranks, which share each stage of a replica."""
    forward: float
    """A stage's forward pass (all its chunks) of a micro-batch of mean cost, with all it waits for inside the stage."""
    backward_ratio: float = 2.0
    """Backward pass over forward pass; 3 with full recomputation."""
    transfer: float = 0.0
    """Of the result of a pass to the neighbouring stage."""
    overlap: bool = False
    """Stages compute while they send and receive (see `schedule_replay`)."""
    after: float = 0.0
    """What follows when all replicas are done: the part of the gradients' reduction that nothing hides, optimizer."""

    def __post_init__(self) -> None:
        stage_ranks = self.ranks_per_stage * self.schedule.pipeline
        if not 1 <= self.ranks <= MOST_RANKS:
            raise ConfigError(f"{self.ranks} ranks, but from 1 to {MOST_RANKS} can be simulated")
        if self.ranks_per_stage < 1 or self.ranks % stage_ranks:
            near = max(1, round(self.ranks / max(1, stage_ranks))) * max(1, stage_ranks)
            raise ConfigError(f"{self.ranks} ranks, but a copy of the model takes tensor x context x pipeline = "
                              f"{stage_ranks}: take a multiple, such as {near}")
        passes = 2 * self.schedule.pipeline * self.schedule.virtual * self.schedule.micro_batches
        if passes > MOST_PASSES:
            raise ConfigError(f"a step of {passes:,} passes in each pipeline, but up to {MOST_PASSES:,} are replayed: "
                              "take fewer micro-batches")
        if not (self.forward > 0 and self.backward_ratio > 0):
            raise ConfigError(f"a forward pass of {self.forward} s and a backward pass of {self.backward_ratio} times "
                              "that: both must be above 0")
        if self.transfer < 0 or self.after < 0:
            raise ConfigError(f"transfer ({self.transfer} s) and the time after the last backward pass ({self.after} "
                              "s) must not be negative")

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.ranks // (self.ranks_per_stage * self.schedule.pipeline)


@dataclass(frozen=True)
class Slowness:
    """How ranks differ. ConfigError for what cannot be."""

    share: float = 0.0
    """Of the ranks, those that are slow, the same ones in all steps."""
    factor: float = 1.0
    """Time of a slow rank over that of another."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of each rank's time in a step; the mean time stays what it is."""

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"the share of slow ranks is {self.share}, but must lie in [0, 1]")
        if self.factor < 1:
            raise ConfigError(f"slow ranks take {self.factor} times as long as others, but must take 1 or more")
        if self.jitter < 0:
            raise ConfigError(f"the jitter is {self.jitter}, but must not be negative")

    def factors(self, job: Job, steps: int, seed: int) -> np.ndarray:
        """How many times as long each stage of each replica takes as on even ranks, [steps, replicas, stages].

        ConfigError where the share of slow ranks is less than half a rank.
        """
        slow = np.ones(job.ranks)
        if self.share > 0:
            count = math.floor(self.share * job.ranks + 0.5)
            if not count:
                raise ConfigError(f"a share of {self.share} of {job.ranks} ranks is no rank: take {1 / job.ranks:.2g} "
                                  "for one slow rank, or 0")
            order = hash64(key64("slow ranks", seed), np.arange(job.ranks))
            slow[np.argsort(order, kind="stable")[:count]] = self.factor
        shape = (job.replicas, job.schedule.pipeline, job.ranks_per_stage)
        if not self.jitter:
            return np.broadcast_to(slow.reshape(shape).max(axis=-1), (steps, *shape[:2]))
        normal = _normals(key64("jitter", seed), steps * job.ranks).reshape(steps, job.ranks)
        drawn = slow * np.exp(self.jitter * normal - self.jitter**2 / 2)
        return drawn.reshape(steps, *shape).max(axis=-1)


@dataclass(frozen=True)
class Steps:
    """Seconds of replayed steps [steps], and of what each rank does in them on average [steps]; the parts add up."""

    total: np.ndarray
    work: np.ndarray
    """Passes at the speed of even ranks."""
    slow: np.ndarray
    """What they take longer, as the slowest rank of a stage makes the others of that stage wait."""
    pipeline: np.ndarray
    """A stage waits for its neighbours: the bubble, and micro-batches or stages of different time."""
    replicas: np.ndarray
    """A replica waits for the slowest one."""
    after: float

    def parts(self) -> dict[str, float]:
        """Mean seconds of each part; their sum is the mean step."""
        means = {name: float(getattr(self, name).mean()) for name in ("work", "slow", "pipeline", "replicas")}
        return {**means, "after": self.after}


def simulate(job: Job, costs: np.ndarray, factors: np.ndarray) -> Steps:
    """Replays steps.

    costs: of each micro-batch over that of the mean one, [steps, replicas, micro-batches].
    factors: see `Slowness.factors`. Both may have 1 in place of steps or replicas: all the same.
    """
    steps = max(costs.shape[0], factors.shape[0])
    schedule = job.schedule
    costs = np.broadcast_to(costs, (steps, job.replicas, schedule.micro_batches))
    factors = np.broadcast_to(factors, (steps, job.replicas, schedule.pipeline))
    at_once = max(1, BLOCK_VALUES // (job.replicas * (schedule.micro_batches + schedule.pipeline)))
    blocks = [_simulate_block(job, costs[i:i + at_once], factors[i:i + at_once]) for i in range(0, steps, at_once)]
    return Steps(*(np.concatenate(each) for each in zip(*blocks)), after=job.after)


def timeline(job: Job, costs: np.ndarray, factors: np.ndarray) -> list[tuple[Task, float, float]]:
    """Each task of one replica with its begin and end, seconds; costs [micro-batches], factors [stages]."""
    tasks: list[tuple[Task, float, float]] = []
    _replay(job, costs[None], factors[None],
            lambda task, begin, end: tasks.append((task, float(begin[0]), float(end[0]))))
    return tasks


def _simulate_block(job: Job, costs: np.ndarray, factors: np.ndarray) -> tuple[np.ndarray, ...]:
    rows = np.concatenate([costs, factors], axis=-1).reshape(-1, costs.shape[-1] + factors.shape[-1])
    # Replicas that are alike are replayed once.
    different, which = np.unique(rows, axis=0, return_inverse=True)
    cost, factor = np.split(different, [costs.shape[-1]], axis=1)
    ends = _replay(job, cost, factor).max(axis=1)
    work = job.forward * (1 + job.backward_ratio) * cost.sum(axis=1)
    busy = work * factor.mean(axis=1)
    ends, work, busy = (values[which.reshape(-1)].reshape(costs.shape[:2]) for values in (ends, work, busy))
    last = ends.max(axis=1)
    mean = ends.mean(axis=1)
    # Where all are alike nobody waits, but for rounding.
    idle, behind = (mean - busy.mean(axis=1)).clip(0), (last - mean).clip(0)
    return last + job.after, work.mean(axis=1), (busy - work).mean(axis=1), idle, behind


def _replay(job: Job, costs: np.ndarray, factors: np.ndarray, observe: Observer | None = None) -> np.ndarray:
    """When the stages of each row are done, [rows, stages]; costs [rows, micro-batches], factors [rows, stages]."""
    forward = np.ascontiguousarray(costs.T) * (job.forward / job.schedule.virtual)
    speed = np.ascontiguousarray(factors.T)

    def seconds(task: Task) -> np.ndarray:
        passes = job.backward_ratio if task.backward else 1.0
        return forward[task.micro_batch] * (speed[task.stage] * passes)

    return replay(job.schedule, seconds, transfer=job.transfer, overlap=job.overlap, observe=observe)


def _normals(key: int, count: int) -> np.ndarray:
    """Standard normal numbers [count] (Box and Muller 1958)."""
    half = (count + 1) // 2
    radius = np.sqrt(-2 * np.log1p(-uniforms(key, np.arange(half))))
    angle = 2 * np.pi * uniforms(key, np.arange(half, 2 * half))
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

"""Rank arithmetic as a value: degrees, coordinates and groups, without a process group.

The order is megatron-core's ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours, then come the parts of a sequence
(context parallel), then data-parallel replicas, and pipeline stages lie furthest apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Coordinate:
    """Place of one rank along each axis of parallelism."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Dims:
    """Degrees of parallelism of a job; their product is the world size."""

    world: int
    tensor: int
    context: int
    data: int
    pipeline: int

    def __post_init__(self) -> None:
        degrees = (self.tensor, self.context, self.data, self.pipeline)
        if min(degrees) < 1 or math.prod(degrees) != self.world:
            raise ValueError(f"tensor x context x data x pipeline is {' x '.join(map(str, degrees))}, "
                             f"but the world is {self.world}")

    @classmethod
    def of_world(cls, world: int, tensor: int, pipeline: int, context: int = 1) -> Dims:
        """Dims whose data-parallel degree is what `world` leaves over; ValueError where it does not divide."""
        return cls(world, tensor, context, world // (tensor * context * pipeline), pipeline)

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a global rank."""
        self._check(rank)
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(tensor, context, data, pipeline)

    def rank(self, at: Coordinate) -> int:
        """Global rank at a coordinate."""
        return at.tensor + self.tensor * (at.context + self.context * (at.data + self.data * at.pipeline))

    def tensor_group(self, rank: int) -> list[int]:
        """Ranks that hold the other slices of the same layers and the same rows of the same packs."""
        return self._along(rank, "tensor")

    def context_group(self, rank: int) -> list[int]:
        """Ranks that hold the same weights and the other rows of the same packs."""
        return self._along(rank, "context")

    def data_group(self, rank: int) -> list[int]:
        """Ranks that hold the same weights and read other packs, in data-parallel order."""
        return self._along(rank, "data")

    def pipeline_group(self, rank: int) -> list[int]:
        """Ranks that pass activations to each other, first stage first."""
        return self._along(rank, "pipeline")

    def replica_group(self, rank: int) -> list[int]:
        """Ranks that hold the same weights, which ZeRO divides optimizer states over: context x data."""
        return sorted(peer for other in self.data_group(rank) for peer in self.context_group(other))

    def _along(self, rank: int, axis: str) -> list[int]:
        at = self.coordinate(rank)
        return [self.rank(replace(at, **{axis: i})) for i in range(getattr(self, axis))]

    def pack_group(self, rank: int) -> list[int]:
        """Ranks that read the same packs, and so together hold one copy of the model: tensor x context x pipeline."""
        return [peer for stage in self.pipeline_group(rank) for other in self.context_group(stage)
                for peer in self.tensor_group(other)]

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} does not exist in a world of {self.world}")


def world_size_from_environment() -> int:
    """Number of processes that the launcher announces; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def adopt_srun(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where srun started several processes, and no other launcher between them and it, give each the variables that
    torchrun would set: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, and where the processes meet unless that is set.
    """
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    of_each_node = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    environment |= {"RANK": environment["SLURM_PROCID"], "LOCAL_RANK": environment["SLURM_LOCALID"],
                    "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
                    "LOCAL_WORLD_SIZE": str(of_each_node[int(environment["SLURM_NODEID"])])}
    environment.setdefault("MASTER_ADDR", environment["SLURM_LAUNCH_NODE_IPADDR"])
    # the same on all nodes, another one for each job of a node, below the ports that systems give out
    environment.setdefault("MASTER_PORT", str(15000 + int(environment["SLURM_JOB_ID"]) % 15000))


def tasks_per_node(text: str) -> list[int]:
    """[2, 2, 1] of Slurm's "2(x2),1"."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts

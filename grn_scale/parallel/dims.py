"""Rank arithmetic as a value: degrees, coordinates and groups, without a process group.

The order is megatron-core's ("tp-cp-ep-dp-pp"): tensor-parallel ranks are neighbours, then come data-parallel
replicas, and pipeline stages lie furthest apart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from grn_scale.errors import ConfigError


@dataclass(frozen=True)
class Coordinate:
    """Place of one rank along each axis of parallelism."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Dims:
    """Degrees of parallelism of a job; their product is the world size."""

    world: int
    tensor: int
    pipeline: int
    data: int

    def __post_init__(self) -> None:
        degrees = (self.tensor, self.data, self.pipeline)
        if min(degrees) < 1 or self.tensor * self.data * self.pipeline != self.world:
            raise ValueError(f"tensor x data x pipeline is {' x '.join(map(str, degrees))}, "
                             f"but the world is {self.world}")

    @classmethod
    def of_world(cls, world: int, tensor: int, pipeline: int) -> Dims:
        """Dims whose data-parallel degree is what `world` leaves over; ValueError where it does not divide."""
        return cls(world, tensor, pipeline, world // (tensor * pipeline))

    def coordinate(self, rank: int) -> Coordinate:
        """Coordinate of a global rank."""
        self._check(rank)
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinate(tensor, data, pipeline)

    def rank(self, at: Coordinate) -> int:
        """Global rank at a coordinate."""
        return at.tensor + self.tensor * (at.data + self.data * at.pipeline)

    def tensor_group(self, rank: int) -> list[int]:
        """Ranks that hold the other slices of the same layers and read the same packs."""
        at = self.coordinate(rank)
        return [self.rank(Coordinate(i, at.data, at.pipeline)) for i in range(self.tensor)]

    def data_group(self, rank: int) -> list[int]:
        """Ranks that hold the same weights and read other packs, in data-parallel order."""
        at = self.coordinate(rank)
        return [self.rank(Coordinate(at.tensor, i, at.pipeline)) for i in range(self.data)]

    def pipeline_group(self, rank: int) -> list[int]:
        """Ranks that pass activations to each other, first stage first."""
        at = self.coordinate(rank)
        return [self.rank(Coordinate(at.tensor, at.data, i)) for i in range(self.pipeline)]

    def model_group(self, rank: int) -> list[int]:
        """Ranks that together hold one copy of the model: tensor x pipeline."""
        return sorted(peer for stage in self.pipeline_group(rank) for peer in self.tensor_group(stage))

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"rank {rank} does not exist in a world of {self.world}")


def world_size_from_environment() -> int:
    """Number of processes that the launcher announces; 1 without a launcher.

    ConfigError where srun started several processes that do not know of each other.
    """
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError("srun started several processes, but WORLD_SIZE, RANK and MASTER_ADDR are not set, so each "
                          "would train alone: start one torchrun a node (srun --ntasks-per-node=1 torchrun ...)")
    return int(os.environ.get("WORLD_SIZE", "1"))

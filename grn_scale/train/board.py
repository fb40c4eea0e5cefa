"""What the processes of a job tell each other beside training: a few small keys in its store.

The store outlives a process (except the one that keeps it) and needs no collective, so the board works while the main
threads are stuck in one. Values are JSON. Any method raises a torch.distributed.DistError where the store is gone.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from grn_scale.train.heartbeat import Beat, Heart


@dataclass(frozen=True)
class Failure:
    """The error that a process ends with."""

    rank: int
    host: str
    code: int
    """Exit code."""
    message: str
    """One line."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} failed: {self.message}"


@dataclass(frozen=True)
class Alarm:
    """Somebody found that the job hangs."""

    rank: int
    """Who found it; this process writes the report."""
    reason: str
    limit: str
    """The setting that was exceeded."""
    folder: str
    """Where the stacks go."""


class Board:
    """One process's view of the board of a run."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        """name: of this start of the run, the same on all processes and never used before in this store."""
        self.rank, self.size = rank, size
        self._store, self._name = store, name
        self._failure: Failure | None = None

    @classmethod
    def open(cls, store: dist.Store, rank: int, size: int, gather: Callable[[object], list]) -> Board:
        """A fresh board, with a beat of everybody on it. Every process must call."""
        board = cls(store, f"grn/{gather(uuid.uuid4().hex)[0]}", rank, size)
        board.post(Beat.of(Heart().now, rank, 0))
        gather(None)
        return board

    def post(self, beat: Beat) -> None:
        self._set(f"beat/{self.rank}", beat.to_dict())

    def beat(self, rank: int) -> Beat:
        """The last beat of a process."""
        return Beat.from_dict(json.loads(self._store.get(f"{self._name}/beat/{rank}")))

    def beats(self) -> list[Beat]:
        """The last beat of every process, in rank order."""
        found = self._store.multi_get([f"{self._name}/beat/{rank}" for rank in range(self.size)])
        return [Beat.from_dict(json.loads(value)) for value in found]

    def raise_alarm(self, alarm: Alarm) -> None:
        """Tell everybody, unless somebody has already."""
        self._set_first("alarm", vars(alarm))

    def alarm(self) -> Alarm | None:
        """The first alarm."""
        values = self._get("alarm")
        return values and Alarm(**values)

    def fail(self, failure: Failure) -> None:
        """Tell everybody with what error this process ends, unless another one was first."""
        self._set_first("failure", vars(failure))

    def failure(self) -> Failure | None:
        """The first failure; once seen, it is known without the store."""
        if self._failure is None and (values := self._get("failure")):
            self._failure = Failure(**values)
        return self._failure

    def answer(self, beat: Beat) -> None:
        """Say, after an alarm, where this process is stuck."""
        self._set(f"answer/{self.rank}", beat.to_dict())
        self._store.add(f"{self._name}/answers", 1)

    def all_answered(self) -> bool:
        return self._store.add(f"{self._name}/answers", 0) >= self.size

    def answers(self) -> list[Beat | None]:
        """What each process answered, in rank order; None of those that did not."""
        found = [self._get(f"answer/{rank}") for rank in range(self.size)]
        return [values and Beat.from_dict(values) for values in found]

    def close(self) -> None:
        """Say that the report of a hang is written."""
        self._set("closed", {})

    def closed(self) -> bool:
        return self._store.check([f"{self._name}/closed"])

    def _set(self, key: str, values: dict[str, Any]) -> None:
        self._store.set(f"{self._name}/{key}", json.dumps(values))

    def _set_first(self, key: str, values: dict[str, Any]) -> None:
        self._store.compare_set(f"{self._name}/{key}", "", json.dumps(values))

    def _get(self, key: str) -> dict[str, Any] | None:
        key = f"{self._name}/{key}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

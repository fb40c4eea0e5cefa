"""What a process is doing: told by its main thread, read by its watchdog, posted for the other processes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SAMPLES_SHOWN = 32
"""Sample keys in a heartbeat at most."""
PHASES = ("start", "data", "step", "restore", "save", "validate", "end")
"""In the order in which a run goes through them at one step number: validation follows the save of a step."""


@dataclass(frozen=True)
class Moment:
    """What the main thread has been at since `since`."""

    phase: str
    """One of PHASES."""
    step: int
    """Updates done, this one included while it is in phase data or step."""
    first: bool
    """No step of this start is done yet."""
    samples: tuple[str, ...]
    """Keys of this process's samples of the step; empty outside phase step."""
    since: float
    """time.monotonic()."""

    @property
    def limit(self) -> str:
        """The field of the watchdog's configuration that bounds this phase."""
        if self.phase in ("data", "step"):
            return "first_step_seconds" if self.first else "step_seconds"
        return {"start": "start_seconds", "restore": "start_seconds",
                "validate": "validate_seconds"}.get(self.phase, "save_seconds")


class Heart:
    """The main thread's word of what it does. `now` is read by other threads: it changes in one assignment."""

    def __init__(self) -> None:
        self.now = Moment("start", 0, True, (), time.monotonic())
        self.failed_with: int | None = None
        """Exit code that an error of the main thread leads to; it is on its way out then."""
        self.saving: Callable[[], bool] = lambda: False
        """Whether a save is in flight beside the main thread."""
        self._first_step: int | None = None

    def enter(self, phase: str, step: int, samples: Sequence[str] = ()) -> None:
        """Begin a phase; it lasts until the next one begins."""
        if phase == "data" and self._first_step is None:
            self._first_step = step
        first = self._first_step is None or step == self._first_step
        self.now = Moment(phase, step, first, tuple(samples), time.monotonic())


@dataclass(frozen=True)
class Beat:
    """A sign of life as the other processes see it."""

    rank: int
    host: str
    pid: int
    count: int
    """One more each time."""
    phase: str
    step: int
    seconds: float
    """In this phase so far."""
    samples: tuple[str, ...] = ()
    """The first SAMPLES_SHOWN keys."""
    more_samples: int = 0
    where: tuple[str, ...] = ()
    """Innermost calls of the main thread, "file:line function"; only where a hang is examined."""

    @classmethod
    def of(cls, moment: Moment, rank: int, count: int, where: Sequence[str] = ()) -> Beat:
        """A beat of this process."""
        return cls(rank, socket.gethostname(), os.getpid(), count, moment.phase, moment.step,
                   round(time.monotonic() - moment.since, 1), moment.samples[:SAMPLES_SHOWN],
                   max(0, len(moment.samples) - SAMPLES_SHOWN), tuple(where))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Beat:
        return cls(**{**values, "samples": tuple(values["samples"]), "where": tuple(values["where"])})


def silent_ranks(before: Sequence[Beat], after: Sequence[Beat]) -> list[int]:
    """Ranks that gave no sign of life in between. One that has come to its end may stop."""
    return [new.rank for old, new in zip(before, after) if old.count == new.count and new.phase != "end"]

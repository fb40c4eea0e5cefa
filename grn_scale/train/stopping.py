"""When a run has to end early: a signal, or a wall clock that runs out.

Signal handlers only set a flag. Every process votes with each step (`votes`), the votes are summed with the step's
scores, so all of them stop behind the same step and there is no collective for it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType

from grn_scale.config.run_schema import StopConfig

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)
"""SIGTERM: torchrun, scancel and preemption; SIGUSR2: `sbatch --signal=USR2@300` ahead of the end."""
RECENT = 20
"""Steps, saves and validations whose longest is reckoned with: the first step, which compiles, drops out."""


class StopRequest:
    """Whether this process has been asked to stop. A context manager: signals are caught inside, in the main thread.

    deadline: Unix time by which the process must be gone; None is none. Once all have agreed to stop, the signals stay
    ignored behind the context too: the process is on its way out, and torchrun sends SIGTERM to all that are still
    there when the first one has gone.
    """

    def __init__(self, settings: StopConfig, deadline: float | None, clock: Callable[[], float] = time.time) -> None:
        self._margin, self._deadline, self._clock = settings.margin_seconds, deadline, clock
        self._took = {phase: deque([0.0], maxlen=RECENT) for phase in ("step", "save", "validate")}
        self._signalled = self._agreed = False
        self._before: dict[int, object] = {}

    def votes(self) -> tuple[float, float]:
        """(1 where a signal came, 1 where the clock allows no step after the one that begins), 0 otherwise."""
        return float(self._signalled), float(self._late())

    def agreed(self, votes: Sequence[float]) -> str:
        """Why all processes stop now, given the sums of their votes; empty where they go on."""
        signals, late = votes
        reasons = [f"{signals:.0f} process{'es' if signals > 1 else ''} got SIGTERM or SIGUSR2"] if signals else []
        reasons += ["the time is up"] if late else []
        self._agreed = bool(reasons)
        return " and ".join(reasons)

    def took(self, phase: str, seconds: float) -> None:
        """Tell how long a step, save or validation took: so much time is kept free for another one."""
        self._took[phase].append(seconds)

    def margin_seconds(self) -> float:
        """Time that has to be left when a step begins behind which the run shall go on: for this step, a save and a
        validation, and for the next step with the save that ends the run."""
        longest = {phase: max(seconds) for phase, seconds in self._took.items()}
        return max(self._margin, 2 * longest["step"] + 2 * longest["save"] + longest["validate"])

    def _late(self) -> bool:
        return self._deadline is not None and self._clock() + self.margin_seconds() >= self._deadline

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._agreed else handler)


def deadline_of(settings: StopConfig, started: float) -> float | None:
    """Unix time by which the process has to be gone: the run's limit from `started` on, or the Slurm job's end where
    that comes first; None without either."""
    ends = [started + settings.time_limit_minutes * 60] if settings.time_limit_minutes else []
    job_end = os.environ.get("SLURM_JOB_END_TIME", "")
    ends += [float(job_end)] if job_end.isdecimal() and int(job_end) > 0 else []
    return min(ends, default=None)

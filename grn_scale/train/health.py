"""health.json in the run folder: how the processes of a run are, for whoever looks from outside.

    {"time", "state", "world_size", "step", "lowest_step", "highest_step", "phases": {phase: processes},
     "silent": [ranks]}

state is running, ended (also where the run was asked to) or failed. A file that says running and is minutes old is
that of a run that was killed or hung.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grn_scale.atomic import write_bytes
from grn_scale.errors import UserError
from grn_scale.train.board import Board
from grn_scale.train.failures import BEAT_SECONDS, LEAVE_SECONDS
from grn_scale.train.heartbeat import Beat, Heart, silent_ranks

FILE_NAME = "health.json"
HEALTH_SECONDS = 15.0
"""Between two versions of the file, and how long a beat may stand still until its process counts as silent."""

log = logging.getLogger("grn_scale.train")


class HealthFile:
    """A context manager that keeps the file up to date from a thread of its own, so that storage that hangs keeps back
    no sign of life. Rank 0 has one. Nothing is written before the first batch: a start that is refused leaves the run
    folder as it was."""

    def __init__(self, run_folder: Path, board: Board, heart: Heart) -> None:
        self._path, self._board, self._heart = run_folder / FILE_NAME, board, heart
        self._before: list[Beat] = []
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="grn-health", daemon=True)

    def __enter__(self) -> HealthFile:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join(LEAVE_SECONDS)

    def _keep(self) -> None:
        written = time.monotonic()
        # soon after a failure: this process may be ended by the watchdog, without leaving the context
        while not self._left.wait(BEAT_SECONDS) and not self._failed():
            if time.monotonic() - written > HEALTH_SECONDS:
                self._write("running")
                written = time.monotonic()
        self._write("failed" if self._failed() else "ended")

    def _failed(self) -> bool:
        try:
            return self._heart.failed_with is not None or self._board.failure() is not None
        except dist.DistError:  # the store is gone, and the processes have learned of each other what they could
            return False

    def _write(self, state: str) -> None:
        if self._heart.now.phase == "start":
            return
        try:
            beats = self._board.beats()
            beats[0] = Beat.of(self._heart.now, 0, beats[0].count)  # this process, without waiting for its next beat
            silent = silent_ranks(self._before, beats) if state == "running" else []
            values = {"time": round(time.time(), 3), "state": state, **overview(beats), "silent": silent}
            write_bytes(self._path, f"{json.dumps(values)}\n".encode(), durable=False)
        except (OSError, UserError, dist.DistError) as error:
            log.warning("%s is not up to date: %s", self._path, error)
        else:
            self._before = beats


def overview(beats: Sequence[Beat]) -> dict[str, Any]:
    """Steps and phases of all processes; the first one's step stands for the run."""
    steps = [beat.step for beat in beats]
    return {"world_size": len(beats), "step": beats[0].step, "lowest_step": min(steps), "highest_step": max(steps),
            "phases": dict(Counter(beat.phase for beat in beats))}

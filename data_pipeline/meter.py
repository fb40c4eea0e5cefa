"""What a long job shows while it runs: a progress bar on stderr, status.json, and where the seconds went."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_json
from grn_scale.errors import UserError

log = logging.getLogger(__name__)

STATUS_SECONDS = 2.0


class Meter:
    """Counts clips and frames and times the parts of the work; use as a context manager."""

    def __init__(self, status_file: Path):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._status_file = status_file
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=Console(stderr=True))
        self._stage, self._done, self._total = "", 0, 0
        self._began = self._written = time.monotonic()
        self._stage_seconds: dict[str, float] = {}
        self._task: Any = None
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds of the main process by part of the work."""
        self.clips = 0
        """Clips encoded by this run."""
        self.frames = 0

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        if error[0] is None:
            self._write("done")
            return
        try:
            self._write("stopped")
        except UserError as failure:
            # What ended the work is the message people need; this one would hide it.
            log.warning("%s is out of date: %s", self._status_file, failure)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """Show a bar of `total` items called `name` while the block runs."""
        self._stage, self._done, self._total = name, 0, total
        self._task = self._progress.add_task(name, total=total, rate="")
        began = time.monotonic()
        try:
            yield
        finally:
            self._stage_seconds[name] = time.monotonic() - began

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to `part`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - began

    def advance(self, items: int = 1) -> None:
        """`items` more of the stage are done."""
        self._done += items
        self._progress.update(self._task, advance=items, rate=self._rate_text())
        if time.monotonic() - self._written >= STATUS_SECONDS:
            self._write("running")

    def status(self) -> dict[str, Any]:
        """Rates and times so far, as plain values. Rates count what this run encoded."""
        busy = sum(self.seconds[part] for part in ("decode_wait", "encode", "write"))
        return {"stage": self._stage, "done": self._done, "total": self._total, "clips": self.clips,
                "frames": self.frames, "clips_per_second": self.clips / busy if busy else 0.0,
                "frames_per_second": self.frames / busy if busy else 0.0,
                "seconds": {part: round(seconds, 3) for part, seconds in sorted(self.seconds.items())},
                "stage_seconds": {name: round(seconds, 3) for name, seconds in self._stage_seconds.items()},
                "seconds_in_all": round(time.monotonic() - self._began, 3)}

    def _rate_text(self) -> str:
        status = self.status()
        return f"{status['clips_per_second']:.1f} clips/s" if self._stage == "videos" and self.clips else ""

    def _write(self, state: str) -> None:
        self._written = time.monotonic()
        write_json(self._status_file, {"state": state, **self.status()})

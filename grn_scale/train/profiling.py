"""A window of training steps recorded by torch's profiler, as a Chrome trace in the run folder.

The first process records: its own kernels and collectives, so one pipeline stage of one replica. How far processes
differ is told by `stragglers`.
"""

from __future__ import annotations

import gzip
import logging
import shutil
import tempfile
from pathlib import Path

import torch

from grn_scale.atomic import atomic_file
from grn_scale.config.run_schema import ProfileConfig
from grn_scale.errors import UserError

log = logging.getLogger("grn_scale.train")


class StepProfiler:
    """A context manager; the trace is written when the step after the window begins, or the run ends without an
    error.

    steps: those that this start of the run is to do, counted from 1. records: true on rank 0; elsewhere every call does
    nothing. A trace that cannot be written is told of, and the run goes on.
    """

    def __init__(self, settings: ProfileConfig, folder: Path, steps: range, records: bool) -> None:
        wanted = range(settings.start, settings.start + settings.steps) if records else range(0)
        self._folder = folder
        self._window = range(max(wanted.start, steps.start), min(wanted.stop, steps.stop))
        self._profile: torch.profiler.profile | None = None
        self._mark: torch.profiler.record_function | None = None
        self._first = self._last = 0
        if wanted and not self._window:
            log.warning("nothing is recorded: profile.start=%d and profile.steps=%d name the steps %d to %d, but the "
                        "run does %d to %d", settings.start, settings.steps, wanted[0], wanted[-1], steps.start,
                        steps.stop - 1)

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._profile is not None:
            self._stop(write=kind is None)

    def begin(self, step: int) -> None:
        """The step begins, and the one before it is over. A run that went back is recorded no second time."""
        if step not in self._window:
            if self._profile is not None:
                self._stop(write=True)
            return
        if self._profile is None:
            self._profile, self._first = torch.profiler.profile(record_shapes=True), step
            self._profile.start()
        self._end_mark()
        self._mark, self._last = torch.profiler.record_function(f"step {step}"), step
        self._mark.__enter__()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _stop(self, write: bool) -> None:
        profile, self._profile, self._window = self._profile, None, range(0)
        self._end_mark()
        profile.stop()
        if not write:
            return
        path = self._folder / f"trace-{self._first:08d}-{self._last:08d}.json.gz"
        try:
            with tempfile.TemporaryDirectory(prefix="grn-trace-") as folder:
                plain = Path(folder) / "trace.json"
                profile.export_chrome_trace(str(plain))
                with (open(plain, "rb") as trace, atomic_file(path) as stream,
                      gzip.GzipFile(path.stem, "wb", 6, stream) as packed):
                    shutil.copyfileobj(trace, packed, 1 << 20)
        except (OSError, UserError) as error:
            log.warning("the trace of the steps %d to %d is not written: %s", self._first, self._last, error)
        else:
            log.info("steps %d to %d are recorded in %s", self._first, self._last, path)

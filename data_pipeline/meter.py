"""What a worker of the fleet says of itself while it works: counts, and where its time goes, in a small JSON file."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from grn_scale.errors import UserError
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "workers/"
SHORTEST_SECONDS, LONGEST_SECONDS = 2.0, 60.0
CHUNKS_A_SECOND = 200
"""Chunks of a job for each second between two looks at it."""


def refresh_seconds(chunks: int) -> float:
    """Seconds between two looks at a job of so many chunks, and between two words of a worker on itself.

    A large job has long listings, many workers, and days to go: what the file system bears sets the pace, not the eye.
    """
    return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, chunks / CHUNKS_A_SECOND))


class WorkerMeter:
    """Counts and times of one worker, written to workers/<name>.json every few seconds; use as a context manager."""

    def __init__(self, storage: Storage, name: str, decoders: int = 0,
                 decode_seconds: Callable[[], float] = float, chunks: int = 0) -> None:
        """decode_seconds: says how long the `decoders` decoding processes were busy so far, all together. chunks: of
        the job, which say how often the file is written."""
        self._storage, self._name, self._decoders, self._decode_seconds = storage, name, decoders, decode_seconds
        self._pause = refresh_seconds(chunks)
        self._began = time.monotonic()
        self._began_at = time.time()
        self._counts: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._writer = threading.Thread(target=self._write_often, name="write-status", daemon=True)

    def __enter__(self) -> WorkerMeter:
        self._writer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._writer.join()
        self._write("done" if error is None else "stopped")

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to `part`; several threads may."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[part] += time.perf_counter() - began

    def encoded(self, clips: int, frames: int) -> None:
        """So many clips have been encoded."""
        self._add(clips=clips, frames=frames)

    def failed(self) -> None:
        """A clip could not be decoded."""
        self._add(failed=1)

    def finished(self, lines: int) -> None:
        """A chunk of so many manifest lines is finished."""
        self._add(chunks=1, lines=lines)

    def status(self, state: str = "working") -> dict[str, Any]:
        """Counts and seconds since the start; `began` and `written` are Unix times."""
        with self._lock:
            counts = {name: self._counts[name] for name in ("chunks", "lines", "clips", "frames", "failed")}
            seconds = {name: round(value, 3) for name, value in sorted(self._seconds.items())}
        return {"state": state, "began": self._began_at, "written": time.time(),
                "wall_seconds": round(time.monotonic() - self._began, 3), **counts,
                "decoders": self._decoders, "seconds": {**seconds, "decode": round(self._decode_seconds(), 3)}}

    def _add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def _write_often(self) -> None:
        while not self._stop.wait(self._pause):
            self._write("working")

    def _write(self, state: str) -> None:
        try:
            self._storage.write_bytes(f"{FOLDER}{self._name}.json", json.dumps(self.status(state)).encode())
        except (OSError, UserError) as error:  # the work goes on without its display
            log.warning("cannot write the status of this worker: %s", error)

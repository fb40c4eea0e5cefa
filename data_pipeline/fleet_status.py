"""What the whole fleet has done so far, as a display and as JSON in status.json.

One task of the fleet keeps it for all: it lists the records, reads what the workers say of themselves and writes the
file. The others read the file, and one of them goes on with it when it no longer changes. So what a file system is
asked does not grow with the number of tasks times that of workers.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from grn_scale.data_pipeline.job import Job
from grn_scale.data_pipeline.meter import FOLDER as WORKERS
from grn_scale.data_pipeline.meter import refresh_seconds
from grn_scale.data_pipeline.read_ahead import read_ahead
from grn_scale.data_pipeline.records import Records
from grn_scale.errors import UserError
from grn_scale.leases import ClaimLost, Leases
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
LEASE = "status"
STAGES = ("decode", "encode", "write")
UNCHANGED_LOOKS = 2
"""Looks in a row that found the file of a working worker unchanged, after which it counts as gone."""


def progress(job: Job, records: Records) -> dict[str, int]:
    """How much of the job is done, as plain values, from the records' names."""
    done = records.finished(job.digests)
    return {"chunks": len(done), "chunks_in_all": len(job.chunks),
            "lines": sum(job.chunks[name.number].clips for name in done), "lines_in_all": job.lines,
            "bad_lines": sum(name.bad for name in done)}


def fleet_status(job: Job, records: Records, workers: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """What is done of the job, and how fast these workers are, as plain values.

    workers: what each says of itself, `WorkerMeter.status`. Occupancy is the share of the time that a stage was busy:
    of the decoding processes, the encoding threads, the writing threads. The stage with the largest is what bounds the
    speed.
    """
    done = progress(job, records)
    wall = sum(values["wall_seconds"] for values in workers)
    decoders = sum(values["decoders"] * values["wall_seconds"] for values in workers)
    busy = {stage: sum(values["seconds"].get(stage, 0.0) for values in workers) for stage in STAGES}
    occupancy = {stage: round(busy[stage] / over, 3) if (over := decoders if stage == "decode" else wall) else 0.0
                 for stage in STAGES}
    elapsed = max((v["written"] for v in workers), default=0.0) - min((v["began"] for v in workers), default=0.0)
    rates = {f"{unit}_per_second": round(sum(values[unit] for values in workers) / elapsed, 3) if elapsed > 0 else 0.0
             for unit in ("clips", "frames")}
    made = sum(values["lines"] for values in workers)
    seconds_left = (job.lines - done["lines"]) * elapsed / made if made else None
    return {**done, "workers": sum(values["state"] == "working" for values in workers),
            "clips": sum(values["clips"] for values in workers), "frames": sum(values["frames"] for values in workers),
            **rates, "occupancy": occupancy,
            "bottleneck": max(occupancy, key=occupancy.get) if any(busy.values()) else None,
            "seconds": {name: round(sum(values["seconds"].get(name, 0.0) for values in workers), 3)
                        for name in sorted({name for values in workers for name in values["seconds"]})},
            "seconds_left": round(seconds_left, 1) if seconds_left is not None else None}


@dataclass
class _Word:
    """What a worker said last of itself."""

    values: dict[str, Any] | None
    unchanged: int
    """Looks in a row that have found it so."""
    next_look: int


class Workers:
    """What the workers say of themselves. A file that stays as it is, as those of dead workers do, is read ever more
    rarely: at most log2(n) times in n looks."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._words: dict[str, _Word] = {}
        self._looks = 0

    def look(self, since: float) -> list[dict[str, Any]]:
        """The last words of all that have spoken after `since` (Unix time); the state of those who seem to have gone
        without one is "gone". OSError where the folder cannot be listed."""
        self._looks += 1
        names = self._storage.names(WORKERS)
        due = [name for name in names if name not in self._words or self._words[name].next_look <= self._looks]
        for name, values in zip(due, read_ahead(self._read, due)):
            before = self._words.get(name)
            unchanged = before.unchanged + 1 if before and before.values == values else 0
            self._words[name] = _Word(values, unchanged, self._looks + 2 ** unchanged)
        words = [word for name in names if (word := self._words[name]).values and word.values["written"] >= since]
        return [{**word.values, "state": "gone"} if word.values["state"] == "working" and
                word.unchanged >= UNCHANGED_LOOKS else word.values for word in words]

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._storage.read(name))
        except (OSError, ValueError) as error:
            log.debug("%s: %s", name, error)  # gone, or another release's; the display does without
            return None


class FleetStatus:
    """The status as this task keeps it, or finds it where another does. `latest` is what is known of it, as
    `fleet_status` gives it."""

    def __init__(self, job: Job, records: Records, leases: Leases, began: float) -> None:
        """began: Unix time; workers that have not been heard of since do not count."""
        self._job, self._records, self._leases, self._began = job, records, leases, began
        self._workers = Workers(job.storage)
        self._keeps = self._checked = False
        self._found: bytes | None = None
        self._told = False  # by another task, since this one began
        self.latest: dict[str, Any] = fleet_status(job, records)

    def refresh(self, state: str) -> None:
        """Bring it up to date; state: of the fleet, as this task sees it. Who keeps the status also removes, once, the
        records whose shards are not there whole, so that those chunks are made again."""
        try:
            if self._still_keeps() or self._begins_to_keep():
                self._keep(state)
        except (OSError, UserError) as error:  # the work goes on without its display
            log.warning("%s is out of date: %s", STATUS_FILE, error)

    def end(self, state: str) -> None:
        """The last refresh, which gives the status into other hands."""
        self._found = None  # without a keeper this task is the one that says how it ended
        self.refresh(state)
        try:
            if self._keeps:
                self._leases.release(LEASE)
            else:
                self._records.refresh()
                # Where nobody has told of the workers, as the claim is a dead task's, this one looks by itself.
                self.latest = (self.latest | progress(self._job, self._records) if self._told else
                               fleet_status(self._job, self._records, self._workers.look(self._began)))
        except OSError as error:
            log.warning("the end of the display: %s", error)

    def _still_keeps(self) -> bool:
        try:
            if self._keeps:
                self._leases.check(LEASE)
        except ClaimLost:  # after a long sleep
            self._keeps = False
        return self._keeps

    def _begins_to_keep(self) -> bool:
        """Whether this task keeps the status from now on; reads what another has written where it does not."""
        before, self._found = self._found, self._read()
        if before is None or self._found == before:
            self._keeps = self._leases.claim(LEASE)
        return self._keeps

    def _read(self) -> bytes:
        """What the file holds, b"" where it is none of this release. What a former run left there is not believed."""
        try:
            data = self._job.storage.read(STATUS_FILE)
            found = json.loads(data)
            if found["written"] >= self._began:
                self.latest = {name: found[name] for name in self.latest}
                self._told = True
            return data
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            log.debug("%s: %s", STATUS_FILE, error)
            return b""

    def _keep(self, state: str) -> None:
        if self._checked:
            self._records.refresh()
        else:
            self._records.drop_incomplete()
            self._checked = True
        self.latest = fleet_status(self._job, self._records, self._workers.look(self._began))
        status = {"state": state, "written": time.time(), **self.latest}
        self._job.storage.write_bytes(STATUS_FILE, json.dumps(status, indent=1).encode())


@contextmanager
def shown(job: Job, records: Records, leases: Leases, began: float) -> Iterator[FleetStatus]:
    """Show the fleet's progress on stderr and see that status.json is kept up to date while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(TextColumn("clips of the manifest"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("{task.fields[about]}"), console=Console(stderr=True))
    task = bar.add_task("", total=job.lines, about="")
    status = FleetStatus(job, records, leases, began)
    stop = threading.Event()

    def show() -> None:
        bar.update(task, completed=status.latest["lines"], about=_about(status.latest))

    def keep_up() -> None:
        while not stop.wait(refresh_seconds(len(job.chunks))):
            status.refresh("running")
            show()

    thread = threading.Thread(target=keep_up, name="show-fleet", daemon=True)
    state = "stopped"
    with bar:
        status.refresh("running")
        show()
        thread.start()
        try:
            yield status
            state = "done"
        finally:
            stop.set()
            thread.join()
            status.end(state)
            show()


def _about(status: dict[str, Any]) -> str:
    busy = "  ".join(f"{stage} {share:.0%}" for stage, share in status["occupancy"].items())
    left = status["seconds_left"]
    eta = "" if not left else f"  {left / 3600:.1f} h left" if left > 5400 else f"  {left / 60:.0f} min left"
    return (f"{status['clips_per_second']:.1f} clips/s  {status['frames_per_second']:.0f} frames/s  "
            f"{status['workers']} workers  busy: {busy}{eta}")

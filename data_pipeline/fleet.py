"""The workers of one machine, started and watched; and what the whole fleet has done so far, as a display and JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from grn_scale.command_line import config_yaml
from grn_scale.config.schema import Config
from grn_scale.data_pipeline.job import Job
from grn_scale.data_pipeline.meter import FOLDER as WORKERS
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.worker import work
from grn_scale.errors import EXIT_DO_NOT_REQUEUE, EXIT_USAGE, ConfigError, DoNotRequeue, UserError

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"
REFRESH_SECONDS = 2.0
RESTARTS = 3
"""Times that a worker which died is started again while no chunk is finished in between."""
STAGES = ("decode", "encode", "write")
_KINDS = {EXIT_DO_NOT_REQUEUE: DoNotRequeue, EXIT_USAGE: ConfigError}


def run_workers(config: Config, name: str, records: Records, retry: bool = False) -> None:
    """Run config.tokenize.workers workers until all chunks are finished, here or elsewhere.

    config: with text.states settled. name: begins the workers' names. A single worker runs in this process; of several
    each is a process, and one that dies is started again. Raises what a worker says: DoNotRequeue, UserError.
    """
    if config.tokenize.workers == 1:
        work(config, f"{name}-0", retry)
        return
    with tempfile.TemporaryDirectory(prefix="grn-tokenize-") as folder:
        file = os.path.join(folder, "config.yaml")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(config_yaml(config))
        command = [sys.executable, "-m", "grn_scale.data_pipeline.worker", "--config", file,
                   *(["--retry-quarantined"] if retry else [])]
        _watch([_Child([*command, "--name", f"{name}-{i}"], i, config.tokenize.threads)
                for i in range(config.tokenize.workers)], records)


class _Child:
    """One worker process, started again when it dies."""

    def __init__(self, command: list[str], number: int, threads: int) -> None:
        self._command = command
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
            self._environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % len(visible.split(","))]
        self.deaths = 0
        self.start()

    def start(self) -> None:
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=self._errors,
                                        env=self._environment)

    def messages(self) -> tuple[str | None, str]:
        """The error for people that it ended with, if any, and the end of all it wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else None, "\n".join(lines[-20:])


def _watch(children: list[_Child], records: Records) -> None:
    """Wait until every child has ended well; start those again that died. All are ended after an error."""
    finished = records.count()
    try:
        while any(child.process.poll() != 0 for child in children):
            for child in children:
                status = child.process.poll()
                if status in (None, 0):
                    continue
                error, everything = child.messages()
                if error:
                    raise _KINDS.get(status, UserError)(error)
                records.refresh()
                child.deaths = child.deaths + 1 if records.count() == finished else 1
                finished = records.count()
                if child.deaths > RESTARTS:
                    raise UserError(f"a worker died {child.deaths} times and finished nothing in between, the last "
                                    f"time with status {status}:\n{everything}")
                log.warning("a worker died with status %d; it is started again", status)
                child.start()
            time.sleep(0.1)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


def fleet_status(job: Job, records: Records, began: float) -> dict[str, Any]:
    """What is done of the job, and how fast all workers that ran since `began` (Unix time) are, as plain values.

    Occupancy is the share of the time that a stage was busy: of the decoding processes, the encoding threads, the
    writing threads. The stage with the largest is what bounds the speed.
    """
    done = records.of_job(job.digests)
    workers = [values for values in _worker_files(job) if values["written"] >= began]
    wall = sum(values["wall_seconds"] for values in workers)
    decoders = sum(values["decoders"] * values["wall_seconds"] for values in workers)
    busy = {stage: sum(values["seconds"].get(stage, 0.0) for values in workers) for stage in STAGES}
    occupancy = {stage: round(busy[stage] / over, 3) if (over := decoders if stage == "decode" else wall) else 0.0
                 for stage in STAGES}
    elapsed = max((v["written"] for v in workers), default=began) - min((v["began"] for v in workers), default=began)
    rates = {f"{unit}_per_second": round(sum(values[unit] for values in workers) / elapsed, 3) if elapsed > 0 else 0.0
             for unit in ("clips", "frames")}
    lines = sum(record.lines for record in done)
    made = sum(values["lines"] for values in workers)
    seconds_left = (job.lines - lines) * elapsed / made if made else None
    return {"chunks": len(done), "chunks_in_all": len(job.chunks), "lines": lines, "lines_in_all": job.lines,
            "bad_lines": sum(sum(record.bad.values()) for record in done),
            "workers": sum(values["state"] == "working" for values in workers),
            "clips": sum(values["clips"] for values in workers), "frames": sum(values["frames"] for values in workers),
            **rates, "occupancy": occupancy,
            "bottleneck": max(occupancy, key=occupancy.get) if any(busy.values()) else None,
            "seconds": {name: round(sum(values["seconds"].get(name, 0.0) for values in workers), 3)
                        for name in sorted({name for values in workers for name in values["seconds"]})},
            "seconds_left": round(seconds_left, 1) if seconds_left is not None else None}


def _worker_files(job: Job) -> Iterator[dict[str, Any]]:
    for name in job.storage.names(WORKERS):
        try:
            yield json.loads(job.storage.read(name))
        except (OSError, ValueError) as error:
            log.debug("%s: %s", name, error)  # gone, or another release's; the display does without


@contextmanager
def shown(job: Job, records: Records, began: float) -> Iterator[None]:
    """Show the fleet's progress on stderr and keep status.json up to date while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    progress = Progress(TextColumn("clips of the manifest"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                        TextColumn("{task.fields[about]}"), console=Console(stderr=True))
    stop = threading.Event()
    task = progress.add_task("", total=job.lines, about="")

    def update(state: str) -> None:
        status = fleet_status(job, records, began)
        progress.update(task, completed=status["lines"], about=_about(status))
        try:
            job.storage.write_bytes(STATUS_FILE, json.dumps({"state": state, **status}, indent=1).encode())
        except (OSError, UserError) as error:  # the work goes on without its display
            log.warning("%s is out of date: %s", STATUS_FILE, error)

    def keep_up() -> None:
        while not stop.wait(REFRESH_SECONDS):
            try:
                records.refresh()
                update("running")
            except OSError as error:  # the work goes on without its display
                log.warning("the display is out of date: %s", error)

    thread = threading.Thread(target=keep_up, name="show-fleet", daemon=True)
    state = "stopped"
    with progress:
        thread.start()
        try:
            yield
            state = "done"
        finally:
            stop.set()
            thread.join()
            records.refresh()
            update(state)


def _about(status: dict[str, Any]) -> str:
    busy = "  ".join(f"{stage} {share:.0%}" for stage, share in status["occupancy"].items())
    left = status["seconds_left"]
    eta = "" if not left else f"  {left / 3600:.1f} h left" if left > 5400 else f"  {left / 60:.0f} min left"
    return (f"{status['clips_per_second']:.1f} clips/s  {status['frames_per_second']:.0f} frames/s  "
            f"{status['workers']} workers  busy: {busy}{eta}")

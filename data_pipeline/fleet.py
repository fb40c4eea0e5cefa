"""The workers of one task of the fleet, started and watched."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time

import torch

from grn_scale.command_line import config_yaml
from grn_scale.config.schema import Config
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.worker import work
from grn_scale.errors import EXIT_DO_NOT_REQUEUE, EXIT_USAGE, ConfigError, DoNotRequeue, UserError

log = logging.getLogger(__name__)

RESTARTS = 3
"""Times that a worker which died is started again while no chunk is finished in between."""
_KINDS = {EXIT_DO_NOT_REQUEUE: DoNotRequeue, EXIT_USAGE: ConfigError}


def run_workers(config: Config, name: str, records: Records) -> None:
    """Run config.tokenize.workers workers until all chunks are finished, here or elsewhere.

    config: with text.states settled. name: begins the workers' names. A single worker runs in this process; of several
    each is a process, and one that dies is started again. Raises what a worker says: DoNotRequeue, UserError.
    """
    if config.tokenize.workers == 1:
        work(config, f"{name}-0")
        return
    with tempfile.TemporaryDirectory(prefix="grn-tokenize-") as folder:
        file = os.path.join(folder, "config.yaml")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(config_yaml(config))
        command = [sys.executable, "-m", "grn_scale.data_pipeline.worker", "--config", file]
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
    finished = len(records.all())
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
                child.deaths = child.deaths + 1 if len(records.all()) == finished else 1
                finished = len(records.all())
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

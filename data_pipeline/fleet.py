"""The workers of one task of the fleet, started and watched."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque

import torch

from grn_scale.command_line import config_yaml
from grn_scale.config.schema import Config
from grn_scale.data_pipeline.records import RecordName, Records
from grn_scale.data_pipeline.worker import work
from grn_scale.errors import EXIT_DO_NOT_REQUEUE, EXIT_USAGE, ConfigError, DoNotRequeue, UserError

log = logging.getLogger(__name__)

RESTARTS = 3
"""Times that a worker which died is started again while no chunk is finished in between."""
_ERROR = re.compile(r"(?:\[rank \d+\] )?error: (.*)")
"""How `command_line.run` tells an error for people; the rank is that of a task of Slurm."""
_KINDS = {EXIT_DO_NOT_REQUEUE: DoNotRequeue, EXIT_USAGE: ConfigError}


def run_workers(config: Config, name: str, records: Records) -> None:
    """Run config.tokenize.workers workers until all chunks are finished, here or elsewhere.

    config: with text.states settled. name: begins the workers' names. A single worker runs in this process; of several
    each is a process, whose log goes to stderr here, and one that dies is started again. Raises what a worker says:
    DoNotRequeue, UserError.
    """
    if config.tokenize.workers == 1:
        work(config, f"{name}-0")
        return
    with tempfile.TemporaryDirectory(prefix="grn-tokenize-") as folder:
        file = os.path.join(folder, "config.yaml")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(config_yaml(config))
        command = [sys.executable, "-m", "grn_scale.data_pipeline.worker", "--config", file]
        _watch([_Child(command, f"{name}-{i}", i, config.tokenize.threads)
                for i in range(config.tokenize.workers)], records)


class _Child:
    """One worker process, started again when it dies."""

    def __init__(self, command: list[str], name: str, number: int, threads: int) -> None:
        self._command, self.name = [*command, "--name", name], name
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
            self._environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % len(visible.split(","))]
        self._deaths = 0
        self._finished: set[RecordName] = set()
        """Records at its last death."""
        self.start()

    def start(self) -> None:
        self._stderr = tempfile.TemporaryFile()
        self._read, self._unfinished = 0, b""
        self.last_words: deque[str] = deque(maxlen=20)
        """Of what it has written to stderr, the last lines."""
        self.error: str | None = None
        """For people, where it ended with one."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=self._stderr,
                                        env=self._environment)

    def pass_on(self) -> None:
        """Write to stderr what the worker has written to its own since the last call, each line with its name. The
        error that it ends with is kept for who raises it here."""
        ended = self.process.poll() is not None
        # By position: a seek would move the place where the worker, which shares the open file, writes.
        while data := os.pread(self._stderr.fileno(), 1 << 20, self._read):
            self._read += len(data)
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            self._tell(lines)
        if ended and self._unfinished:
            self._tell([self._unfinished])
            self._unfinished = b""

    def _tell(self, lines: list[bytes]) -> None:
        for line in (line.decode(errors="replace").rstrip() for line in lines):
            if error := _ERROR.fullmatch(line):
                self.error = error[1]
            else:
                print(f"{self.name}: {line}", file=sys.stderr)
            self.last_words.append(line)

    def dies(self, records: Records) -> int:
        """How often it has died, this time included, since a chunk was finished, here or elsewhere."""
        finished = set(records.all())
        # By name, not by number: a chunk that is tried again has a record in the place of another.
        self._deaths = 1 if finished - self._finished else self._deaths + 1
        self._finished = finished
        return self._deaths


def _watch(children: list[_Child], records: Records) -> None:
    """Wait until every child has ended well; start those again that died. All are ended after an error."""
    try:
        while any(child.process.poll() != 0 for child in children):
            for child in children:
                status = child.process.poll()
                child.pass_on()
                if status in (None, 0):
                    continue
                if child.error:
                    raise _KINDS.get(status, UserError)(child.error)
                records.refresh()
                deaths, said = child.dies(records), child.last_words
                if deaths > RESTARTS:
                    raise UserError(f"the worker {child.name} died {deaths} times and no chunk was finished in "
                                    f"between, the last time with status {status}:\n" + "\n".join(said))
                log.warning("the worker %s died with status %d and is started again; it said %s", child.name, status,
                            f"last: {said[-1]}" if said else "nothing")
                child.start()
            time.sleep(0.1)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
            child.pass_on()

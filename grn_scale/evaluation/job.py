"""One call of `grn-scale evaluate`: what its measurements are given, alone or as one of several processes.

The work is a list of numbered jobs. Process r of R takes the jobs r, r + R, r + 2R, ... A job does not depend on who
does it, and what comes out is put together in the order of the numbers: any number of processes gives the same result.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from grn_scale.checkpoint.ranks import Ranks
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.sampling.source import Source

JOINING = datetime.timedelta(minutes=10)
"""Processes wait for the others to start so long: one that never comes must not hold a node for days."""
PATIENCE = datetime.timedelta(days=2)
"""Processes that have finished wait for the others so long. One that dies ends the wait at once."""
FAILED = "failed"
"""File that tells the other processes to stop."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a measurement works with."""

    source: Source | None
    """The checkpoint of --run."""
    config: Config
    options: argparse.Namespace
    folder: Path
    """Where results go; made when the first is there."""
    ranks: Ranks

    def checkpoint(self, option: str) -> Source:
        """The checkpoint; ConfigError where `option` needs one and there is no --run."""
        if self.source is None:
            raise ConfigError(f"{option} measures a trained model: give --run RUN")
        return self.source

    def make_folder(self) -> None:
        """Make `folder` where it is missing. UserError where that fails."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output: cannot make {self.folder}: {error.strerror}") from error


@contextmanager
def processes() -> Iterator[Ranks]:
    """The processes that torchrun started, joined over gloo while the block runs; without a launcher this one alone.

    On GPUs each process takes the one of its LOCAL_RANK.
    """
    import torch
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(alone=True)
        return
    if torch.cuda.is_available():
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            # No ConfigError: only the first process of a node tells these, and it has a GPU.
            raise UserError(f"process {local} of this node has no GPU: the node shows {count}; start at most {count} "
                            "processes a node")
        torch.cuda.set_device(local)
    dist.init_process_group("gloo", timeout=JOINING)
    try:
        yield Ranks(dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def together(ranks: Ranks, step: Callable[[], T]) -> T:
    """What `step` gives on this process, once it has succeeded on all; where it raises on one, all raise."""
    own: list[T] = []
    ranks.all(lambda: own.append(step()))
    return own[0]


@dataclass(frozen=True)
class Shares:
    """Jobs divided over processes, and a folder that all of them write parts into. Made by `shared`."""

    ranks: Ranks
    folder: Path

    def mine(self, jobs: Sequence[T]) -> Iterator[tuple[int, T]]:
        """(number, job) of this process's share. Ends early where another process has failed."""
        for number in range(self.ranks.rank, len(jobs), self.ranks.size):
            if (self.folder / FAILED).exists():
                return
            yield number, jobs[number]

    def run(self, step: Callable[[], list[T]]) -> list[T]:
        """What `step` gives on all processes, one list after the other, on every process.

        Where it raises on one, the others stop before their next job and all raise, naming the rank.
        """
        def watched() -> list[T]:
            try:
                return step()
            except BaseException:  # whatever it is, the others must not work on for nothing; raised again
                (self.folder / FAILED).touch()
                raise
        return [entry for part in self.ranks.all(watched) for entry in part]


@contextmanager
def shared(job: Job) -> Iterator[Shares]:
    """Shares of the job's processes; their folder of parts goes away with the block."""
    def make() -> str:
        job.make_folder()
        return tempfile.mkdtemp(prefix="parts-", dir=job.folder)

    folder = job.ranks.first(make)
    try:
        yield Shares(job.ranks, Path(folder))
    finally:
        if job.ranks.rank == 0:
            for path in Path(folder).iterdir():
                path.unlink()
            Path(folder).rmdir()

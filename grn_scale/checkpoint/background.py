"""Checkpoints that are written while training goes on.

`BackgroundSaver.save` copies the state to the host and returns; a thread writes the copy, over a process group that
nothing else uses. At most one save is in flight.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.ranks import RankError, Ranks
from grn_scale.checkpoint.staging import HostStaging, Sections
from grn_scale.errors import UserError

FAILURES_IN_A_ROW = 3
"""Saves that may fail one after the other until the run stops: by then nobody is mending the disk."""
TIMEOUT = timedelta(minutes=60)
"""Processes wait for each other's files, which are written, and read back, meanwhile."""

log = logging.getLogger(__name__)


class BackgroundSaver:
    """All saves of one run; a context manager, made and used by every rank alike.

    A save that the storage refuses (full disk, quota, lost mount) is logged as an error and does not stop the run: the
    next one tries again, the last complete checkpoint stays. The third in a row that fails, and one that fails right
    before `wait`, raise UserError; any other error is raised at the next `save` or `wait`. All on every rank together.
    Leaving the context waits too; after an error it only lets the save in flight finish.
    """

    def __init__(self, run_folder: str | Path, *, keep_last: int, keep_every: int = 0, background: bool = True) -> None:
        """keep_last, keep_every: see `save_checkpoint`. background=False writes in the calling thread, without a copy.

        Collective: makes a process group.
        """
        self.run_folder, self.keep_last, self.keep_every = Path(run_folder), keep_last, keep_every
        self.background = background
        self.stall_seconds = 0.0
        """How long the last `save` kept its caller: waiting for the one before, and copying (or writing)."""
        self.write_seconds = 0.0
        """How long the last checkpoint that was finished took to write."""
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self._ranks = Ranks(self._group)  # the calling thread uses it only while no save is in flight
        self._staging = HostStaging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[None] | None = None
        self._failures = 0

    @property
    def busy(self) -> bool:
        """Whether a save is in flight (of this rank; it says nothing about how it will end)."""
        return self._written is not None and not self._written.done()

    def reserve(self, size: int) -> None:
        """Allocate the host memory of the saves to come (bytes, see `staging_bytes`), so that the first one is as quick
        as the others. Collective; UserError where a rank has not so much."""
        if self.background:
            self._ranks.all(lambda: self._staging.reserve(size))

    def save(self, step: int, sections: Sections, state: dict[str, Any], *, doubtful: bool = False) -> None:
        """Begin to save; see `save_checkpoint` for the arguments. The tensors may change as soon as it returns."""
        begin = time.perf_counter()
        self._settle(self._tolerate)
        copies: dict[str, Any] = {}

        def copy() -> None:
            # The caller's dictionary may change, too; what is no JSON is refused here.
            copies.update(state=json.loads(json.dumps(state, allow_nan=False)),
                          sections=self._staging.copy(sections) if self.background else sections)

        self._ranks.all(copy)
        write = self._thread.submit if self.background else _at_once
        self._written = write(self._write, step, copies["sections"], copies["state"], doubtful)
        self.stall_seconds = time.perf_counter() - begin

    def wait(self) -> None:
        """Return once the save in flight is a complete checkpoint; UserError where the storage refused it."""
        self._settle(_give_up)

    def _write(self, step: int, sections: Sections, state: dict[str, Any], doubtful: bool) -> None:
        begin = time.perf_counter()
        try:
            path = save_checkpoint(self.run_folder, step, sections, state, keep_last=self.keep_last,
                                   keep_every=self.keep_every, doubtful=doubtful, group=self._group)
        except Exception as error:  # said now, raised in the training thread at the next save or wait
            refused = isinstance(error, UserError)
            if self._ranks.rank == 0 or not (refused or isinstance(error, RankError)):
                log.error("THE CHECKPOINT OF STEP %d WAS NOT SAVED%s: %s", step, f" (failure {self._failures + 1} in a "
                          f"row; at {FAILURES_IN_A_ROW} the run stops)" if refused else "", error)
            raise
        self.write_seconds = time.perf_counter() - begin
        if self._ranks.rank == 0:
            log.info("saved %s in %.1f s", path, self.write_seconds)

    def _settle(self, on_refusal: Callable[[UserError], None]) -> None:
        """Wait for the save in flight and make all ranks agree about how it ended."""
        if self._written is None:
            return
        error, self._written = self._written.exception(), None

        def outcome() -> None:
            if error is not None:
                raise error

        try:
            self._ranks.all(outcome)
        except UserError as refused:
            self._failures += 1
            on_refusal(refused)
        else:
            self._failures = 0

    def _tolerate(self, error: UserError) -> None:
        if self._failures >= FAILURES_IN_A_ROW:
            raise UserError(f"{self._failures} checkpoints in a row could not be saved, so the run stops; the last: "
                            f"{error}") from error

    def __enter__(self) -> BackgroundSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
            elif self.busy:
                # Alone: after an error nobody knows whether the other ranks come here.
                log.error("%s: %s; leaving once the checkpoint in flight is written", kind.__name__, error)
        finally:
            self._thread.shutdown()
            self._staging.release()


def _at_once(write: Callable[..., None], *arguments: Any) -> Future[None]:
    """What `Executor.submit` returns, after doing the work in this thread."""
    done: Future[None] = Future()
    try:
        done.set_result(write(*arguments))
    except Exception as error:  # raised when the result is asked for
        done.set_exception(error)
    return done


def _give_up(error: UserError) -> None:
    raise error

"""The first error of a job reaches all its processes, before the losses of contact that it causes do."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from grn_scale.errors import EXIT_FAILED, UserError
from grn_scale.train.board import Board, Failure
from grn_scale.train.heartbeat import Heart, silent_ranks

BEAT_SECONDS = 2.0
"""Between the signs of life of a process."""
CONTACT_SECONDS = 3 * BEAT_SECONDS
"""How long a process that lost contact looks for the reason: by then every living process has given a sign."""
LEAVE_SECONDS = 30.0
"""Time for a process that fails, or whose job is gone, to end by itself, and for its threads beside training."""

log = logging.getLogger("grn_scale.train")


class JobFailed(UserError):
    """Another process failed; this one ends with the same exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def errors_shared(board: Board, heart: Heart) -> Iterator[None]:
    """An error inside is put on the board for the other processes and raised again.

    A collective that broke off because another process is gone raises JobFailed instead, with that process's error, or
    with its name where it ended without a word.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the others must learn of it; it is raised again
        if heart.failed_with is not None:  # inside of another one: told already
            raise
        heart.failed_with = error.exit_code if isinstance(error, UserError) else EXIT_FAILED
        try:
            reason = _reason(error, board, heart)
        except dist.DistError as gone:
            if not lost_contact(error):
                log.warning("the other processes cannot be told: %s", first_line(gone))
                raise error from None
            raise JobFailed("contact with the other processes is lost, and with the job's store: the process that "
                            "keeps it, rank 0 or torchrun on the first node, ended without a word",
                            EXIT_FAILED) from None
        if reason is not None:
            heart.failed_with = reason.code
            raise JobFailed(str(reason), reason.code) from None
        raise


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) if isinstance(error, UserError) else str(error).strip().split("\n")[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def lost_contact(error: BaseException) -> bool:
    """Whether an error only says that a collective broke off, which is no reason but the trace of one."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer")))


def _reason(error: Exception, board: Board, heart: Heart) -> Failure | None:
    """Why this process really fails; None where the error says it."""
    if not lost_contact(error):
        board.fail(Failure(board.rank, socket.gethostname(), heart.failed_with, first_line(error)))
        if board.rank == 0 and board.size > 1:
            time.sleep(1.25 * BEAT_SECONDS)  # it may keep the store: the others have to see it before it is gone
        return None
    if (failure := board.failure()) is not None:
        return failure
    before, until = board.beats(), time.monotonic() + CONTACT_SECONDS
    while time.monotonic() < until:
        failure = board.failure()
        if failure is not None:
            return failure
        time.sleep(BEAT_SECONDS / 10)
    after = board.beats()
    for rank in silent_ranks(before, after):
        dead = after[rank]
        board.fail(Failure(rank, dead.host, EXIT_FAILED, f"its process {dead.pid} ended without a word in {dead.phase} "
                           f"of step {dead.step} (killed, out of memory, or its node is lost)"))
        return board.failure()
    board.fail(Failure(board.rank, socket.gethostname(), EXIT_FAILED, first_line(error)))
    return None

"""Waiting for a job until it has ended for good, through all its starts (--wait)."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from grn_scale.errors import EXIT_FAILED
from grn_scale.slurm.records import Submission
from grn_scale.slurm.standing import FINISHED, Standing, standing_of

POLL_SECONDS = 2.0
SLOWEST_POLL_SECONDS = 30.0
"""Between two questions to Slurm: it answers many people."""

log = logging.getLogger("grn_scale")


def wait_for(records: Path) -> int:
    """The exit code of a submission once Slurm has nothing of it in the queue any more: 0 where the command is done,
    else that of the last start. Every change of its state is logged."""
    submission, told, pause = Submission.read(records), "", POLL_SECONDS
    while True:
        standing = standing_of(submission)
        line = described(standing)
        if line != told:
            log.info("%s", line)
            told, pause = line, POLL_SECONDS
        if standing.queue.problem:
            log.warning("Slurm cannot be asked: %s", standing.queue.problem)
        elif not standing.active:
            return exit_code(standing)
        time.sleep(pause)
        pause = min(pause * 1.2, SLOWEST_POLL_SECONDS)


def described(standing: Standing) -> str:
    """A submission's state in a line."""
    jobs = " ".join(standing.submission.job_ids)
    elements = "" if standing.elements is None else (
        " (" + ", ".join(f"{count} {state}" for state, count in standing.elements.items()) + ")")
    detail = f": {standing.detail}" if standing.detail else ""
    return f"job {jobs}: {standing.state}{elements}, {len(standing.starts)} starts so far{detail}"


def exit_code(standing: Standing) -> int:
    """That of a submission of which nothing is in the queue."""
    if standing.state == FINISHED:
        return 0
    ended = [start.code for start in standing.starts if start.code]
    return ended[-1] if ended else EXIT_FAILED

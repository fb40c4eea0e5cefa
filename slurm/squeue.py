"""What Slurm says of jobs, as plain values. That it cannot be asked is one of the answers: the files of a run can be
looked at from machines that know nothing of Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grn_scale.errors import UserError

ANSWER_SECONDS = 60
"""How long a controller that is busy may take."""
ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
                   "PREEMPTED", "REVOKED", "TIMEOUT"})
"""States that a job does not leave. Slurm forgets such a job after some minutes."""
_ID = re.compile(r"(\d+)(?:_(\d+))?")
_FIELDS = "%i|%T|%N|%S|%e|%r"
_GONE = "Invalid job id"


@dataclass(frozen=True)
class Entry:
    """A job, or an element of an array, that Slurm knows."""

    job: int
    task: int | None
    """Index in the array."""
    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETING, TIMEOUT, ..."""
    nodes: str
    starts: int | None
    """Unix time of its start, or when it is expected."""
    ends: int | None
    """Unix time at which it ended or its time is up."""
    reason: str
    """Why it waits or ended, in Slurm's words; empty where it gives none."""

    @property
    def active(self) -> bool:
        """Whether it waits, runs, or is being cleaned up behind."""
        return self.state not in ENDED

    @property
    def id(self) -> str:
        """As Slurm's commands take it."""
        return str(self.job) if self.task is None else f"{self.job}_{self.task}"


@dataclass(frozen=True)
class Queue:
    """Slurm's answer on some jobs."""

    entries: tuple[Entry, ...] = ()
    problem: str = ""
    """Why Slurm could not be asked; empty where it answered, and then what is not among the entries is gone."""

    @property
    def active(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.active]

    def find(self, job: int, task: int | None) -> Entry | None:
        return next((entry for entry in self.entries if (entry.job, entry.task) == (job, task)), None)


@dataclass(frozen=True)
class Answer:
    """What one of Slurm's commands said."""

    text: str
    problem: str
    """Empty where it did what it was asked."""


def job_ids(words: Iterable[str | int]) -> list[str]:
    """Numbers of jobs as they stand in a file. UserError for anything else: they become arguments of commands."""
    ids = [str(word).strip() for word in words]
    for word in ids:
        if not (word.isascii() and word.isdigit()):
            raise UserError(f"{word!r} is no number of a Slurm job: mend or remove that line of the file job-ids")
    return ids


def tell(command: Sequence[str]) -> Answer:
    """Run one of Slurm's commands, without a shell. One that is missing, silent or refused is a problem, no error."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SCANCEL_"))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS,
                              stdin=subprocess.DEVNULL, env={**environment, "SLURM_TIME_FORMAT": "%s"})
    except FileNotFoundError:
        return Answer("", f"there is no {command[0]} on this machine")
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]} has not answered for {ANSWER_SECONDS} s")
    except OSError as error:
        return Answer("", f"{command[0]} cannot be run: {error.strerror}")
    said = " ".join(done.stderr.split()) or f"{command[0]} ended with exit code {done.returncode}"
    return Answer(done.stdout, said if done.returncode else "")


def ask(jobs: Sequence[str | int]) -> Queue:
    """What Slurm knows of these jobs, each element of an array by itself, by number."""
    ids = job_ids(jobs)
    if not ids:
        return Queue()
    answer = tell(["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(ids)}",
                   f"--format={_FIELDS}"])
    if answer.problem:
        return Queue() if _GONE in answer.problem else Queue(problem=answer.problem)
    entries = [entry for line in answer.text.splitlines() if (entry := _entry(line)) is not None]
    return Queue(tuple(sorted(entries, key=lambda entry: (entry.job, entry.task or 0))))


def _entry(line: str) -> Entry | None:
    fields = line.strip().split("|", 5)
    name = _ID.fullmatch(fields[0])
    if len(fields) < 6 or name is None:
        return None  # a message of the site's between the lines
    _, state, nodes, starts, ends, reason = fields
    return Entry(int(name[1]), int(name[2]) if name[2] else None, state, nodes.strip(), _time(starts), _time(ends),
                 "" if reason in ("None", "N/A") else reason)


def _time(field: str) -> int | None:
    """Unix seconds; None where Slurm does not know."""
    return int(field) if field.isdigit() and int(field) else None

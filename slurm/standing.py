"""How a submission stands: Slurm's word where its job is in the queue, else what the files tell of its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from grn_scale.slurm.records import CANCELLED, STOPPED, Submission
from grn_scale.slurm.squeue import Entry, Queue, ask
from grn_scale.slurm.starts import Start, in_words, of_task, read_starts

FINISHED, STOPPED_STATE, CANCELLED_STATE, DIED, ENDED_STATE = "finished", "stopped", "cancelled", "died", "ended"
_FIRST = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "PENDING")
"""Of several jobs of a chain, the one whose state comes first here stands for all."""


@dataclass(frozen=True)
class Standing:
    """A submission as it is now."""

    submission: Submission
    starts: tuple[Start, ...]
    queue: Queue
    state: str
    """Slurm's word in capitals, or finished, stopped, cancelled, died (nobody started it again), ended (another job has
    to go on), started (Slurm cannot be asked whether it still runs), submitted, unsubmitted."""
    detail: str
    """Why, in a line; empty where there is nothing to say."""
    elements: dict[str, int] | None
    """Of an array: how many elements are in each state."""

    @property
    def active(self) -> bool:
        """Whether Slurm has something of it in the queue."""
        return bool(self.queue.active)

    def runs(self, start: Start) -> bool | None:
        """Whether a start is running; None where Slurm cannot be asked."""
        same = [each for each in self.starts if (each.job, each.task) == (start.job, start.task)]
        if start.ended is not None or same[-1] != start:
            return False
        if self.queue.problem:
            return None
        entry = self.queue.find(start.job, start.task)
        return entry is not None and entry.active and entry.state != "PENDING"


def standing_of(submission: Submission) -> Standing:
    """Asks Slurm and reads the records, in that order: an end that comes in between shows."""
    queue = ask(submission.job_ids)
    starts = read_starts(submission.folder)
    array = submission.facts.get("array")
    if not array:
        return Standing(submission, tuple(starts), queue, *_state(submission, starts, queue, queue.entries), None)
    states = [_state(submission, of_task(starts, task), queue, [e for e in queue.entries if e.task == task])
              for task in range(array)]
    counts = Counter(state for state, _ in states)
    state, detail = min(states, key=lambda each: _precedence(each[0]))
    return Standing(submission, tuple(starts), queue, state, detail,
                    dict(sorted(counts.items(), key=lambda item: _precedence(item[0]))))


def _state(submission: Submission, starts: Sequence[Start], queue: Queue, entries: Sequence[Entry]) -> tuple[str, str]:
    """State and detail of a job or of one element of an array."""
    active = sorted((entry for entry in entries if entry.active), key=lambda entry: _precedence(entry.state))
    cancelled = submission.folder / CANCELLED
    if active:
        cancelling = cancelled.exists() and active[0].state != "PENDING"
        return active[0].state, "asked to save and end: it is cancelled" if cancelling else active[0].reason
    last = starts[-1] if starts else None
    task = None if last is None else last.task
    stopped = submission.folder / (STOPPED if task is None else f"{STOPPED}.{task}")
    if last is not None and last.decision == "done":
        return FINISHED, ""
    if stopped.exists() and (last is None or last.decision in ("stop", "drop")):
        return STOPPED_STATE, " ".join(stopped.read_text(encoding="utf-8", errors="replace").split())
    if cancelled.exists() or last is not None and last.decision == "cancelled":
        return CANCELLED_STATE, ""
    if last is None:
        return _never_started(submission, queue, entries)
    word = next((entry.state for entry in entries if (entry.job, entry.task) == (last.job, last.task)), "")
    if last.ended is None:
        if queue.problem:
            return "started", f"Slurm cannot be asked whether it still runs: {queue.problem}"
        return DIED, f"Slurm says {word}" if word else "its batch script ended without a word, and Slurm forgot the job"
    if last.decision == "requeue" and queue.problem:
        return "requeued", f"Slurm cannot be asked: {queue.problem}"
    if last.decision == "requeue":
        return DIED, f"{in_words(last.code)}; it went back into the queue, and is not there" + (
            f" (Slurm says {word})" if word else "")
    return ENDED_STATE, in_words(last.code)


def _never_started(submission: Submission, queue: Queue, entries: Sequence[Entry]) -> tuple[str, str]:
    if not submission.job_ids:
        return "unsubmitted", "sbatch has given it no number"
    if queue.problem:
        return "submitted", f"Slurm cannot be asked: {queue.problem}"
    if entries:
        return entries[-1].state, entries[-1].reason
    return DIED, "it left the queue without a start"


def _precedence(state: str) -> int:
    return _FIRST.index(state) if state in _FIRST else len(_FIRST) + (state == FINISHED)

"""The starts of a job: which there were, on which nodes, how far each came and how it ended (starts.jsonl)."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grn_scale.errors import EXIT_DO_NOT_REQUEUE, EXIT_FAILED, EXIT_HANG, EXIT_REQUEUE, EXIT_USAGE

log = logging.getLogger("grn_scale.slurm")

_CODES = {0: "done", EXIT_FAILED: "failed", EXIT_USAGE: "bad usage or configuration",
          EXIT_REQUEUE: "asked to stop, wants to go on", EXIT_DO_NOT_REQUEUE: "failed, and would fail again",
          EXIT_HANG: "hung, ended by the watchdog"}
DECISIONS = {"done": "finished", "requeue": "back into the queue", "stop": "stopped",
             "next": "the next job goes on", "left": "to be submitted again", "cancelled": "cancelled",
             "drop": "not started"}


@dataclass(frozen=True)
class Start:
    """One start of a job or of an element of an array."""

    job: int
    """Of an array: its own number, the same for all elements."""
    task: int | None
    restart: int
    """How often Slurm had started it before."""
    began: float | None
    """Unix time; None: it was refused before anything ran."""
    nodes: str = ""
    progress_before: int = 0
    """Step of the newest checkpoint (training) or finished chunks (tokenization) when it began."""
    ended: float | None = None
    """Unix time; None: it runs, or its batch script died without a word."""
    progress: int | None = None
    code: int | None = None
    decision: str | None = None
    """done, requeue, stop, next, left (nothing starts it again), cancelled or drop (refused to start)."""

    @property
    def id(self) -> str:
        """The job as Slurm names it."""
        return str(self.job) if self.task is None else f"{self.job}_{self.task}"

    @property
    def name(self) -> str:
        """Of its folders in logs/ and preflight/."""
        return f"{self.id}-{self.restart}"

    @property
    def at(self) -> float:
        """Unix time of the first that is known of it."""
        return self.began if self.began is not None else self.ended or 0.0


def read_starts(records: Path) -> list[Start]:
    """The starts of a submission, oldest first; empty where there were none. Damaged lines are left out with a warning:
    a node may die while it writes."""
    found: dict[tuple[int, int | None, int], Start] = {}
    for event in (event for path in sorted(records.glob("starts*.jsonl")) for event in _events(path)):
        key = event["job"], event["task"], event["restart"]
        if event["event"] == "start":
            found[key] = Start(*key, began=event["time"], nodes=event["nodes"], progress_before=event["progress"])
        else:
            before = found.get(key, Start(*key, began=None, progress_before=event["progress"]))
            found[key] = replace(before, ended=event["time"], progress=event["progress"], code=event["code"],
                                 decision=event["decision"])
    return sorted(found.values(), key=lambda start: start.at)


def file_of(records: Path, task: int | None) -> Path:
    """Where a job, or an element of an array, writes its starts."""
    return records / ("starts.jsonl" if task is None else f"starts.{task}.jsonl")


def of_task(starts: Sequence[Start], task: int | None) -> list[Start]:
    """Those of one element of an array; all for None."""
    return [start for start in starts if task is None or start.task == task]


def in_words(code: int | None) -> str:
    """What an exit code says, as a phrase; empty for None."""
    if code is None:
        return ""
    if code > 128 and code - 128 in iter(signal.Signals):
        return f"killed by {signal.Signals(code - 128).name}"
    return _CODES.get(code, "failed")


def _events(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield _checked(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s:%d is left out, it is no record of a start: %r", path, number, error)


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """The event. ValueError, KeyError or TypeError where it is none that job.sh writes."""
    numbers = ["job", "restart", "time", "progress", *(["code"] if event["event"] == "end" else []),
               *(["task"] if event["task"] is not None else [])]
    words = {"start": ["nodes"], "end": ["decision"]}[event["event"]]
    if any(not isinstance(event[name], int) for name in numbers) or any(
            not isinstance(event[name], str) for name in words):
        raise ValueError(f"{event} has values of other kinds")
    return event

"""The error that ended a process, found in its log; and what Slurm said of a job, found in its batch script's.

A process ends by its own error, or because of another process: then it names that one (train/failures.py, and the
report of a hang), or only says that contact is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OWN, NAMES_ANOTHER, HANGS, LOST_CONTACT = "own", "names another", "hangs", "lost contact"
LONGEST_LINES = 60
"""Of an error that is shown: the first of them are left out of a longer one."""

_PREFIX = re.compile(r"^\[rank\d+\]: ?")
"""torch's, on each line of a traceback."""
_ERROR = re.compile(r"^(?:\[rank \d+\] |[\d:T-]+Z |srun: )?error: (?P<text>.*)")
"""Of a process; of the batch script, behind a time; of srun."""
_TRACEBACK = re.compile(r"^\s*(?:\+ )?(?:Exception Group )?Traceback \(most recent call last\):")
_CHAIN = ("During handling of the above exception", "The above exception was the direct cause")
_NATIVE = re.compile(r"Fatal Python error: |^Timeout \(\d+:\d\d:\d\d|terminate called |\bSegmentation fault\b|"
                     r"^Bus error|^Killed\b|^Aborted\b|CUDA out of memory|CUDA error: |(?i:oom[-_ ]kill)|Out Of Memory")
_LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d")
_POINTS = re.compile(r"\brank (\d+) on (\S+) failed: (.*)", re.DOTALL)
_BEHIND = re.compile(r"(?:behind is|no answer from) rank (\d+) on (\S+)")
_CONTACT = re.compile(r"gloo/|\bNCCL|Connection closed by peer|Connection reset by peer|Broken pipe|TCPStore|"
                      r"Dist(?:Network|Store|Backend)?Error|contact with the other processes is lost|"
                      r"job's store has been out of reach")


@dataclass(frozen=True)
class LogError:
    """The error that a process ended with."""

    kind: str
    """OWN, NAMES_ANOTHER (that failed), HANGS (all of them, may name who is behind) or LOST_CONTACT."""
    line: str
    """The error in a line."""
    text: str
    """All of it, with its traceback."""
    rank: int | None = None
    """The process that is named."""
    node: str = ""
    """Its machine."""


def errors(log: str) -> list[LogError]:
    """The errors in (the end of) a log, in order."""
    lines = [_PREFIX.sub("", line.rstrip()) for line in log.splitlines()]
    return [_judged(line, block) for line, block in _blocks(lines)]


def _judged(line: str, lines: Sequence[str]) -> LogError:
    text = "\n".join(lines[-LONGEST_LINES:])
    named = _POINTS.search(text)
    if named:
        return LogError(NAMES_ANOTHER, named[3].split("\n")[0], text, int(named[1]), named[2])
    if "the run hangs: " in text:
        behind = _BEHIND.search(text)
        return LogError(HANGS, line, text, int(behind[1]) if behind else None, behind[2] if behind else "")
    return LogError(LOST_CONTACT if _CONTACT.search(line) else OWN, line, text)


def _blocks(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each error of a log: its one line, and all its lines."""
    at = 0
    while at < len(lines):
        begin, error = at, _ERROR.match(lines[at])
        if _TRACEBACK.match(lines[at]):
            message, at = _traceback(lines, at)
            if not begin or not lines[begin - 1].startswith("Exception ignored"):  # of an object that went away
                yield message, list(lines[begin:at])
        elif error:
            at = _indented(lines, at + 1)
            yield error["text"], list(lines[begin:at])
        elif _NATIVE.search(lines[at]) and not _LOG_LINE.match(lines[at]):
            at = _stacks(lines, at + 1) if "Fatal Python" in lines[at] or "Timeout" in lines[at] else at + 1
            yield lines[begin].strip(), list(lines[begin:at])
        else:
            at += 1


def _traceback(lines: Sequence[str], at: int) -> tuple[str, int]:
    """The exception's line of a traceback that begins at line `at`, and the line behind. Of a chain of exceptions it is
    the first one's, which the others came from."""
    first = ""
    while at < len(lines):
        at = _indented(lines, at + 1)
        if at < len(lines) and lines[at]:
            first = first or lines[at].strip()
            at += 1
        while at < len(lines) and lines[at] and not _begins(lines[at]):  # a message of several lines
            at += 1
        next_one = next((i for i in range(at, min(at + 4, len(lines))) if _TRACEBACK.match(lines[i])), None)
        if next_one is None or not any(line.startswith(_CHAIN) for line in lines[at:next_one]):
            break
        at = next_one
    return first or "a traceback without its end", at


def _begins(line: str) -> bool:
    """Whether something else begins with a line."""
    return bool(_LOG_LINE.match(line) or _ERROR.match(line) or _TRACEBACK.match(line) or _NATIVE.search(line))


def _indented(lines: Sequence[str], at: int) -> int:
    while at < len(lines) and lines[at][:1].isspace():
        at += 1
    return at


def _stacks(lines: Sequence[str], at: int) -> int:
    """Behind the stacks that faulthandler wrote."""
    while at < len(lines) and (not lines[at] or lines[at][:1].isspace() or
                               lines[at].startswith(("Thread ", "Current thread ", "Extension modules"))):
        at += 1
    return at

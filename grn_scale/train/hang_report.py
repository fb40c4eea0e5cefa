"""Why a job hangs, as far as the answers of its processes tell: who is behind, where, and on which samples."""

from __future__ import annotations

import faulthandler
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from grn_scale.train.board import Alarm
from grn_scale.train.heartbeat import PHASES, Beat, Moment

REPORT = "report.txt"
NAMED = 8
"""Ranks that a message names at most."""
FRAMES = 6
"""Innermost calls of the main thread that an answer holds."""


def who_is_behind(answers: Sequence[Beat | None]) -> list[int]:
    """Ranks that the others seem to wait for; empty where the answers tell no difference.

    A process that does not answer at all, else the lowest step and earliest phase, else whoever does not wait in a
    collective while others do, else whoever is not where most are.
    """
    silent = [rank for rank, beat in enumerate(answers) if beat is None]
    if silent:
        return silent
    for trait in (lambda beat: (beat.step, PHASES.index(beat.phase)), _waits):
        values = [trait(beat) for beat in answers]
        if min(values) != max(values):
            return [rank for rank, value in enumerate(values) if value == min(values)]
    places = Counter(beat.where[:1] for beat in answers)
    common, count = places.most_common(1)[0]
    return [beat.rank for beat in answers if beat.where[:1] != common] if 2 * count > len(answers) else []


def _waits(beat: Beat) -> bool:
    return any("torch/distributed/" in call for call in beat.where)


def describe(beat: Beat) -> str:
    """One line: where a process is and on what."""
    text = (f"rank {beat.rank} on {beat.host} (process {beat.pid}): step {beat.step}, {beat.phase} for "
            f"{beat.seconds:.0f} s")
    if beat.where:
        text += f", in {beat.where[0]}"
    if beat.samples:
        text += f", samples {' '.join(beat.samples)}" + (f" and {beat.more_samples} more" if beat.more_samples else "")
    return text


def headline(alarm: Alarm, answers: Sequence[Beat | None], last: Sequence[Beat]) -> str:
    """The message for people. last: the last beat of each process, for those that do not answer."""
    behind = who_is_behind(answers)
    lines = [f"the run hangs: {alarm.reason}"]
    for rank in behind[:NAMED]:
        answer = answers[rank]
        lines.append(f"behind is {describe(answer)}" if answer else
                     f"no answer from {describe(last[rank])} when it was last heard of")
    if len(behind) > NAMED:
        lines.append(f"and {len(behind) - NAMED} more")
    others = Counter(f"{beat.phase} of step {beat.step}" for rank, beat in enumerate(answers)
                     if beat is not None and rank not in behind)
    if behind:
        waiting = ", ".join(f"{count} in {what}" for what, count in others.most_common(3))
        lines.append(f"the others wait: {waiting}" if others else "nobody else answers")
    else:
        lines.append("no process differs from the others")
    lines.append(f"stacks of all: {alarm.folder}; if this was no hang, raise {alarm.limit}")
    return "\n  ".join(lines)


def write_report(alarm: Alarm, text: str, answers: Sequence[Beat | None]) -> None:
    """report.txt beside the stacks: the message, and a line for each process that answered."""
    folder = Path(alarm.folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [describe(beat) for beat in answers if beat is not None]
    (folder / REPORT).write_text("\n".join([text, "", *lines, ""]), encoding="utf-8")


def write_stacks(alarm: Alarm, beat: Beat, moment: Moment) -> None:
    """rank-NNNNN.txt: what this process does, all its samples, and the stacks of all its threads."""
    folder = Path(alarm.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{beat.rank:05d}.txt", "w", encoding="utf-8") as file:
        print(describe(beat), f"samples: {' '.join(moment.samples)}", "", sep="\n", file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)


def innermost_calls(thread: int) -> tuple[str, ...]:
    """The innermost calls of a thread of this process, innermost first."""
    calls: list[str] = []
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None and len(calls) < FRAMES:
        calls.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return tuple(calls)

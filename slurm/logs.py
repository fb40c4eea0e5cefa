"""grn-scale slurm logs: what a process of a job said, and what it says while it runs."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.errors import ConfigError, UserError
from grn_scale.slurm.records import LOGS, Submission, newest
from grn_scale.slurm.squeue import ask
from grn_scale.slurm.starts import Start, file_of, of_task, read_starts
from grn_scale.slurm.tail import begin_of_last_lines

POLL_SECONDS = 0.5
ASK_SECONDS = 30.0
"""Between two questions to Slurm while nothing is written."""
_RANK = re.compile(r"rank-(\d+)\.log")


def rank_logs(submission: Submission, start: Start) -> dict[int, Path]:
    """The log of each process of a start, by rank, ascending; empty where no process was started."""
    folder = submission.folder / LOGS / start.name
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {int(name[1]): entry for entry in entries if (name := _RANK.fullmatch(entry.name))}
    return dict(sorted(found.items()))


def batch_log(submission: Submission, job: str) -> Path:
    """What the batch scripts of a job (12, or 12_3 in an array) said in all its starts; it need not exist."""
    return submission.folder / LOGS / f"job-{job}.out"


def chosen_start(submission: Submission, task: int | None, restart: int | None) -> Start:
    """The newest start that ran, of one element where the job is an array. UserError naming what there is otherwise."""
    starts = [start for start in read_starts(submission.folder) if start.began is not None]
    array = submission.facts.get("array")
    if array and task is None:
        tasks = sorted({start.task for start in starts})
        raise UserError(f"the job is an array of {array} elements: choose one with --task; started are "
                        f"{', '.join(map(str, tasks)) or 'none'}")
    if task is not None and not array:
        raise ConfigError("--task is for arrays, and this job is none; leave it out")
    mine = of_task(starts, task)
    if not mine:
        what = "the job" if task is None else f"element {task}"
        raise UserError(f"{what} has not started yet; `grn-scale slurm status` says what it waits for")
    if restart is None:
        return mine[-1]
    found = [start for start in mine if start.restart == restart]
    if not found:
        there = ", ".join(dict.fromkeys(str(start.restart) for start in mine))
        raise UserError(f"there is no restart {restart}; there are {there}")
    return found[-1]


def rank_log(submission: Submission, start: Start, rank: int) -> Path:
    """Log of one process. UserError naming those that are there where it has none."""
    logs = rank_logs(submission, start)
    if rank in logs:
        return logs[rank]
    if not logs:
        raise UserError(f"start {start.name} has no logs of processes (yet): --batch shows what its batch script says")
    raise UserError(f"start {start.name} has no log of rank {rank}; there are {_ranges(list(logs))}")


def _ranges(numbers: Sequence[int]) -> str:
    """0-3, 6: ascending numbers, short."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class Follower:
    """Writes a file to stdout as it grows, and goes on with the file of the next start where there is one."""

    def __init__(self, submission: Submission, start: Start, rank: int | None) -> None:
        """rank: whose log; None: the batch script's."""
        self._submission, self._start, self._rank = submission, start, rank
        self._asked = time.monotonic()
        self._known: tuple[int, list[Start]] = 0, []

    def follow(self, path: Path, offset: int) -> None:
        """Return when the job has ended and everything is written."""
        while True:
            ended = self._ended()  # before the last look at the file
            offset = _copy(path, offset)
            following = self._following()
            if following is not None:
                _copy(path, offset)
                self._start, path, offset = following[0], following[1], following[2]
                print(f"--- start {self._start.name} ---", file=sys.stderr, flush=True)
            elif ended:
                return
            else:
                time.sleep(POLL_SECONDS)

    def _following(self) -> tuple[Start, Path, int] | None:
        """A newer start with its file and where it begins; None as long as there is none."""
        newer = [start for start in self._starts() if start.at > self._start.at and start.began is not None]
        for start in newer:
            if self._rank is None:
                if start.id == self._start.id:  # the same file goes on
                    self._start = start
                    continue
                path = batch_log(self._submission, start.id)
            else:
                path = rank_logs(self._submission, start).get(self._rank)
            if path is not None and path.exists():
                return start, path, 0
        return None

    def _starts(self) -> list[Start]:
        size = file_of(self._submission.folder, self._start.task).stat().st_size
        if size != self._known[0]:
            self._known = size, of_task(read_starts(self._submission.folder), self._start.task)
        return self._known[1]

    def _ended(self) -> bool:
        """Whether nothing more will come: by the decision of the last start, or as Slurm says now and then."""
        last = self._starts()[-1]
        if last.decision in ("done", "stop", "cancelled", "drop"):
            return True
        if time.monotonic() - self._asked < ASK_SECONDS:
            return False
        self._asked = time.monotonic()
        queue = ask(self._submission.job_ids)
        mine = [entry for entry in queue.active if self._start.task in (None, entry.task)]
        return not queue.problem and not mine


def _copy(path: Path, offset: int) -> int:
    """Write the file from `offset` on to stdout; the offset behind."""
    sys.stdout.flush()
    with open(path, "rb") as file:
        file.seek(min(offset, file.seek(0, os.SEEK_END)))  # a file that became shorter was written anew
        shutil.copyfileobj(file, sys.stdout.buffer)
        offset = file.tell()
    sys.stdout.buffer.flush()
    return offset


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale slurm logs argv...`."""
    parser = CommandParser("slurm logs", "Print the log of a process of a job: of its newest start, unless told "
                           "otherwise.", "grn-scale slurm logs runs/first --rank 3 --follow", configured=False)
    parser.add_argument("run", metavar="RUN", help="output folder of the job, or its folder of records")
    parser.add_argument("--rank", type=int, default=0, help="which process (default: 0)")
    parser.add_argument("--task", type=int, help="which element of an array")
    parser.add_argument("--restart", type=int, metavar="N", help="which start: 0 is the first (default: the newest)")
    parser.add_argument("--batch", action="store_true", help="what the batch script said, over all starts of a job")
    parser.add_argument("--lines", type=int, default=50, metavar="N",
                        help="how many, from the end (default: 50); 0: all")
    parser.add_argument("--follow", action="store_true",
                        help="go on as it grows, over restarts too, until the job ends or Ctrl-C")
    options = parser.parse_options(argv)
    if options.lines < 0:
        raise ConfigError(f"--lines is {options.lines}, but must be 0 (all) or more")
    start_logging()
    submission = newest(options.run)
    start = chosen_start(submission, options.task, options.restart)
    path = batch_log(submission, start.id) if options.batch else rank_log(submission, start, options.rank)
    print(f"--- {path} ---", file=sys.stderr, flush=True)
    offset = begin_of_last_lines(path, options.lines)
    if options.follow:
        try:
            Follower(submission, start, None if options.batch else options.rank).follow(path, offset)
        except KeyboardInterrupt:
            return 0  # the way to end it
    else:
        _copy(path, offset)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

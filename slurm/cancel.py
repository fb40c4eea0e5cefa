"""grn-scale slurm cancel: end a job for good, by default with time to save."""

from __future__ import annotations

import json
from collections.abc import Sequence

from grn_scale.atomic import write_bytes
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.errors import UserError
from grn_scale.slurm.records import CANCELLED, Submission, submissions
from grn_scale.slurm.squeue import Answer, Entry, ask, tell


def cancel(submission: Submission, *, now: bool) -> tuple[list[Entry], list[Entry]]:
    """Cancel all jobs of a submission: (those that were taken out at once, those that were asked to save and end).

    now: ask nobody. The mark is made first, so that what ends meanwhile does not go back into the queue; it goes away
    again where Slurm has nothing of the job. UserError where Slurm cannot be asked or refuses.
    """
    mark = submission.folder / CANCELLED
    marked = mark.exists()
    write_bytes(mark, b"")
    queue = ask(submission.job_ids)
    if queue.problem:
        raise UserError(f"nothing is cancelled, as Slurm cannot be asked ({queue.problem}); but the job will not go "
                        f"back into the queue, by the mark {mark}. Run this on a login node")
    if not queue.active:
        if not marked and submission.job_ids:  # one without a number may be in the queue: sbatch had no answer
            mark.unlink(missing_ok=True)
        return [], []
    # Those that wait go first: the end of the job before would start them.
    saving = [] if now else [entry for entry in queue.active if entry.state == "RUNNING"]
    others = [entry for entry in queue.active if entry not in saving]
    problems = [*_scancel(others, []), *_scancel(saving, ["--signal=USR2", "--batch"])]
    if problems:
        raise UserError(f"{'; '.join(problems)}. The job will not go back into the queue; `grn-scale slurm status` "
                        "tells what is left of it: run the same command again")
    return others, saving


def _scancel(entries: Sequence[Entry], options: Sequence[str]) -> list[str]:
    """What scancel complains of; a job that ended meanwhile is no complaint."""
    if not entries:
        return []
    answer: Answer = tell(["scancel", *options, *(entry.id for entry in entries)])
    return [] if not answer.problem or _gone(entries) else [answer.problem]


def _gone(entries: Sequence[Entry]) -> bool:
    queue = ask(sorted({entry.job for entry in entries}))
    left = {entry.id for entry in queue.active}
    return not queue.problem and not any(entry.id in left for entry in entries)


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale slurm cancel argv...`."""
    parser = CommandParser(
        "slurm cancel", "Cancel the jobs of a run: all submissions, all jobs of a chain, all elements of an array. "
        "What runs is asked to save\nand end, and does not go back into the queue.",
        "grn-scale slurm cancel runs/first", configured=False, json=True)
    parser.add_argument("run", metavar="RUN", help="output folder of the job, or its folder of records")
    parser.add_argument("--now", action="store_true", help="do not wait for a save")
    options = parser.parse_options(argv)
    start_logging()
    # an earlier submission may still be in the queue, of an array for example that got help
    removed, saving, given = [], [], submissions(options.run)
    for submission in given:
        gone, asked = cancel(submission, now=options.now)
        removed, saving = [*removed, *gone], [*saving, *asked]
    if options.json:
        print(json.dumps({"submission": str(submission.folder), "cancelled": [entry.id for entry in removed],
                          "saving": [entry.id for entry in saving]}, indent=2))
        return 0
    for entry in removed:
        print(f"cancelled: {entry.id} ({entry.state})")
    for entry in saving:
        print(f"asked to save and end: {entry.id} on {entry.nodes}")
    if saving:
        print("`grn-scale slurm status` tells when it has; `grn-scale slurm cancel --now` does not wait for it")
    if not removed and not saving:
        if submission.job_ids:
            print(f"nothing to cancel: Slurm has no job of {submission.folder} (any more); `grn-scale slurm status` "
                  "tells how it ended")
        else:
            print(f"no number of a job is in {submission.folder}: where sbatch got no answer and Slurm has one all the "
                  f"same, it will not start its work, by the mark {submission.folder / CANCELLED}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

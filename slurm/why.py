"""grn-scale slurm why: what ended the last start of a job, whom to blame, and what happens next."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.slurm.diagnosis import Diagnosis, diagnose
from grn_scale.slurm.records import newest
from grn_scale.slurm.squeue import Entry
from grn_scale.slurm.standing import CANCELLED_STATE, DIED, ENDED_STATE, FINISHED, STOPPED_STATE, Standing, standing_of
from grn_scale.slurm.starts import Start
from grn_scale.slurm.times import clock

REASONS = {
    "Resources": "it waits for free nodes", "Priority": "others are before it",
    "Dependency": "it waits for the job before it", "BeginTime": "Slurm lets a requeued job wait for about two minutes",
    "JobHeldUser": "it is held: scontrol release JOB", "JobHeldAdmin": "an administrator holds it",
    "job requeued in held state": "it was put back and is held: scontrol release JOB",
    "launch failed requeued held": "it could not be started, and is held: scontrol release JOB",
    "DependencyNeverSatisfied": "the job before it failed, so it never starts: cancel it, then submit again",
    "PartitionTimeLimit": "it asks for more time than the partition gives: cancel it, then submit again with less",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives: cancel it, then submit again with fewer",
    "ReqNodeNotAvail": "nodes that it needs are down or reserved",
}
"""Slurm's words for why a job waits -> what that means."""


@dataclass(frozen=True)
class Why:
    """The answer."""

    headline: str
    """How the run is, or what ended its last start."""
    start: str
    """Name of the start that is explained; empty where there is none to explain."""
    diagnosis: Diagnosis | None
    others: list[str]
    """Further starts, of other elements of an array, that are not fine either."""
    next: str
    """What happens next, or what to do."""


def explain(standing: Standing) -> Why:
    """Why a submission stands as it does."""
    over = [start for start in standing.starts if standing.runs(start) is not True]
    ran = [start for start in over if start.began is not None]
    troubled = _newest_of_each(ran) if standing.elements is not None else ran[-1:]
    runs = standing.starts and standing.runs(standing.starts[-1]) is True
    found = {start: diagnose(standing.submission, start, _slurm_on(standing, start)) for start in troubled}
    bad = [start for start in found if found[start].failed]
    told = bad[-1] if bad else troubled[-1] if troubled and standing.elements is None else None
    refused = next((start for start in reversed(over) if start.began is None and start.decision == "stop"), None)
    if standing.state == FINISHED and not bad:
        return Why("nothing is wrong: the job is done", "", None, [], "nothing is left to do")
    if told is None:
        wrong = standing.state in (DIED, STOPPED_STATE)
        head = f"{'' if wrong else 'nothing is wrong: '}{_state(standing)}"
        return Why(head, "", None, [], _next(standing))
    head = f"start {told.name} ended {clock(told.ended)}: " if told.ended is not None else f"start {told.name}: "
    head += found[told].headline
    if refused is not None:
        head = f"{diagnose(standing.submission, refused, '').headline}. The last one that ran, {head}"
    elif standing.state == CANCELLED_STATE:
        head = f"the job is cancelled; {head}"
    elif runs and not standing.elements:
        head = f"the job runs again, since {clock(standing.starts[-1].began)}. Before, {head}"
    return Why(head, told.name, found[told], [start.name for start in bad if start is not told], _next(standing))


def _newest_of_each(starts: list[Start]) -> list[Start]:
    """The newest start of each element, the one that ended last at the end."""
    newest_start = {start.task: start for start in starts}
    return sorted(newest_start.values(), key=lambda start: start.ended or start.at)


def _slurm_on(standing: Standing, start: Start) -> str:
    if standing.queue.problem:
        return f"it may run, Slurm cannot be asked ({standing.queue.problem})"
    entry = standing.queue.find(start.job, start.task)
    return f"Slurm says {entry.state}" if entry is not None and not entry.active else ""


def _state(standing: Standing) -> str:
    detail = f" ({standing.detail})" if standing.detail else ""
    return f"the job {'' if standing.state in (DIED, ENDED_STATE) else 'is '}{standing.state}{detail}"


def _next(standing: Standing) -> str:
    """What happens next without anybody's doing, else what to do."""
    again = (f"submit it again with the same `grn-scale slurm {standing.submission.kind} ... --submit`, and it goes on "
             f"from {_reached(standing)}")
    active = standing.queue.active
    if active:
        return "; ".join(_waits_or_runs(entry) for entry in active[:8]) + ("; ..." if len(active) > 8 else "")
    if standing.state == STOPPED_STATE:
        return f"it does not start again ({standing.detail}): mend the cause, then {again}"
    if standing.state in (CANCELLED_STATE, DIED, ENDED_STATE):
        return f"nothing starts it again: {again}"
    return _state(standing)


def _reached(standing: Standing) -> str:
    known = [start.progress_before if start.progress is None else start.progress for start in standing.starts]
    if standing.submission.kind == "train" and max(known, default=0):
        return f"step {max(known)}"
    return f"{max(known)} finished chunks" if standing.submission.kind == "tokenize" and known else "the beginning"


def _waits_or_runs(entry: Entry) -> str:
    if entry.state != "PENDING":
        return f"job {entry.id} is {entry.state}" + (f" on {entry.nodes}" if entry.nodes else "")
    reason = REASONS.get(entry.reason.strip("()").split(",")[0], "")
    text = f"job {entry.id} waits in the queue" + (f" ({entry.reason})" if entry.reason else "")
    text += f": {reason}" if reason else ""
    return text + (f", expected to start at {clock(entry.starts)}" if entry.starts else "")


def document(standing: Standing, why: Why) -> dict[str, Any]:
    """The answer as plain values."""
    found = why.diagnosis
    return {"run": standing.submission.facts["run"], "submission": str(standing.submission.folder),
            "state": standing.state, "headline": why.headline, "start": why.start or None,
            "failed": found is not None and found.failed,
            "diagnosis": None if found is None else {**asdict(found), "log": str(found.log) if found.log else None},
            "others": why.others, "next": why.next}


def show(why: Why) -> None:
    """Print the answer for people."""
    print(why.headline)
    found = why.diagnosis
    if found is not None:
        if found.rank is not None:
            print(f"  culprit  rank {found.rank}" + (f" on {found.node}" if found.node else ""))
        elif found.node and found.failed:
            print(f"  node     {found.node}")
        if found.log is not None:
            print(f"  log      {found.log}")
        if found.text:
            print(textwrap.indent(found.text, "    | "))
    if why.others:
        print(f"  not fine either: {', '.join(why.others[:16])}{' ...' if len(why.others) > 16 else ''}")
    print(f"next: {why.next}")


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale slurm why argv...`."""
    parser = CommandParser("slurm why", "Say what ended the last start of a job, the process that is to blame first, "
                           "and what happens next.", "grn-scale slurm why runs/first", configured=False, json=True)
    parser.add_argument("run", metavar="RUN", help="output folder of the job, or its folder of records")
    options = parser.parse_options(argv)
    start_logging()
    standing = standing_of(newest(options.run))
    why = explain(standing)
    if options.json:
        print(json.dumps(document(standing, why), indent=2))
    else:
        show(why)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

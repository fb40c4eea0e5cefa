"""What ended a start of a job, and which process is to blame: the one that failed by itself, not those that lost
contact because of it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grn_scale.errors import EXIT_HANG, EXIT_REQUEUE
from grn_scale.slurm import log_errors
from grn_scale.slurm.batch_events import KILLED_FOR_MEMORY, Event, events, of_start
from grn_scale.slurm.log_errors import HANGS, NAMES_ANOTHER, OWN, LogError
from grn_scale.slurm.logs import batch_log, rank_logs
from grn_scale.slurm.nodelist import expand
from grn_scale.slurm.records import Submission
from grn_scale.slurm.starts import Start, in_words
from grn_scale.slurm.tail import last_bytes

TAIL_BYTES = 1 << 16
"""Of each process's log: the error stands at its end."""
BATCH_TAIL_BYTES = 1 << 22
READERS = 16
SHOWN_LINES = 20
CLOCK_SECONDS = 60.0
"""By which the clocks of nodes and file servers may differ."""
ASKED, GOES_BACK = "Z asked to stop", ": back into the queue"
"""What job.sh says when it is told that the end is near, and when it puts the job back."""
STEP_ENDED = "*** STEP "
_IN_ORDER = re.compile(r"\S+: .{11,} (?:ok|skipped)\s+\S")
STOPPING, NOT_SAVED = "stopping after step ", "not saved"
"""What training logs when it was asked to stop."""


@dataclass(frozen=True)
class Diagnosis:
    """Why a start ended."""

    headline: str
    """A sentence."""
    rank: int | None = None
    """The process to blame."""
    node: str = ""
    log: Path | None = None
    """Where its error, or what is known of it, stands."""
    text: str = ""
    """The error as it was said."""
    failed: bool = True
    """False where nothing went wrong: it is done, or was asked to end."""


@dataclass(frozen=True)
class _Scene:
    """All that is there to look at."""

    submission: Submission
    start: Start

    @cached_property
    def logs(self) -> dict[int, Path]:
        return rank_logs(self.submission, self.start)

    @cached_property
    def batch(self) -> Path:
        return batch_log(self.submission, self.start.id)

    @cached_property
    def said(self) -> str:
        """By the batch script, in all its starts."""
        return last_bytes(self.batch, BATCH_TAIL_BYTES).decode(errors="replace") if self.batch.is_file() else ""

    @cached_property
    def part(self) -> str:
        """What it said in this start."""
        return of_start(self.said, self.start.restart)

    @cached_property
    def told(self) -> list[Event]:
        """By Slurm, before the batch script itself put the job back into the queue: it tells of that, too."""
        return list(events(self.part.partition(GOES_BACK)[0]))

    @cached_property
    def errors(self) -> dict[int, list[LogError]]:
        """In the log of each process, in order."""
        with ThreadPoolExecutor(READERS) as pool:  # a thousand logs on a parallel file system
            return dict(zip(self.logs, pool.map(lambda path: log_errors.errors(_tail(path)), self.logs.values())))

    @cached_property
    def last(self) -> dict[int, LogError]:
        """Of each process that told one, its last error."""
        return {rank: errors[-1] for rank, errors in self.errors.items() if errors}

    @cached_property
    def own(self) -> LogError | None:
        """The first error in the batch script's log: of what could not even be started."""
        return next((error for error in log_errors.errors(self.part)
                     if error.kind == OWN and not any(events(f"srun: error: {error.line}"))), None)

    def told_of(self, *kinds: str) -> Event | None:
        return next((event for event in self.told if event.kind in kinds), None)

    def node(self, rank: int) -> str:
        """Of a process, by Slurm's word, else by the order of ranks on nodes."""
        told = next((event.node for event in self.told if event.kind == "task" and event.rank == rank), "")
        nodes, each = expand(self.start.nodes), self.submission.facts.get("processes_per_node") or 0
        return told or (nodes[rank // each] if each and rank // each < len(nodes) else "")

    def first(self, ranks: Mapping[int, LogError]) -> int:
        """The rank that failed first: whose end Slurm told first, else whose log is the oldest."""
        told = [event.rank for event in self.told if event.kind == "task" and event.rank in ranks]
        return told[0] if told else min(ranks, key=lambda rank: (self.logs[rank].stat().st_mtime, rank))


def diagnose(submission: Submission, start: Start, slurm: str) -> Diagnosis:
    """Why a start that is over ended. slurm: what Slurm has to say to a start without an end; may be empty."""
    scene = _Scene(submission, start)
    if start.code == 0 and start.decision == "done":
        return Diagnosis("it is done", failed=False)
    if start.began is None:
        return _refused(scene)
    found = (_preflight(scene) if not scene.logs else None) or _hang(scene)
    if found is None and start.code == EXIT_REQUEUE:
        # one that fails makes srun tell the others to end, and they save
        return (None if ASKED in scene.part else _by_errors(scene)) or _asked(scene)
    if found is None and start.code is None:  # an error in a log need not have ended it
        found = _by_events(scene, "node", "job")
    found = found or _by_errors(scene) or _by_events(scene, "node", "job", "task", "memory")
    return found or (_without_end(scene, slurm) if start.code is None else _without_reason(scene))


def _refused(scene: _Scene) -> Diagnosis:
    """The last line in which the batch script says why it started nothing."""
    reasons = [line for line in scene.said.splitlines() if "stopped: " in line or "not started: " in line]
    line = reasons[-1].partition(" ")[2] if reasons else "the batch script refused to start it"
    return Diagnosis(line, log=scene.batch, failed=scene.start.decision == "stop")


def _preflight(scene: _Scene) -> Diagnosis | None:
    """Of the nodes that did not pass; None where all did or none was looked at."""
    folder = scene.submission.folder / "preflight" / scene.start.name
    if not folder.is_dir():
        return None
    passed = {path.stem for path in folder.glob("*.ok")}
    failed = [node for node in expand(scene.start.nodes) if node not in passed]
    if not failed:
        return None
    results = {node: folder / f"{node}.json" for node in failed}
    first = results[failed[0]]
    what = f"the preflight failed on {', '.join(failed)}, before any process was started"
    if not first.exists() and scene.own:  # it could not even be started
        return Diagnosis(f"{what}: {scene.own.line}", node=failed[0], log=scene.batch, text=scene.own.text)
    return Diagnosis(what, node=failed[0], log=first if first.exists() else folder,
                     text="\n".join(f"{node}: {_preflight_of(path)}" for node, path in results.items()))


def _preflight_of(path: Path) -> str:
    """What failed, by the file of a node."""
    try:
        failed = [result for result in json.loads(path.read_bytes())["results"] if result["state"] == "failed"]
        lines = ["; ".join(filter(None, (f"{each['check']}: {each['detail']}", each["remedy"]))) for each in failed]
        return "\n  ".join(lines) or "it did not come to an end"
    except FileNotFoundError:
        return "it did not answer"
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read: {error!r}"


def _hang(scene: _Scene) -> Diagnosis | None:
    """The report that the watchdog left while the start ran."""
    start = scene.start
    if start.code not in (EXIT_HANG, None) or scene.submission.kind != "train":
        return None
    until = (math.inf if start.ended is None else start.ended) + CLOCK_SECONDS
    reports = [path for path in sorted(Path(scene.submission.facts["run"]).glob("hangs/*/report.txt"))
               if start.began - CLOCK_SECONDS <= path.stat().st_mtime <= until]
    if not reports:
        return None
    text = reports[-1].read_text(encoding="utf-8", errors="replace").strip()
    error = log_errors.errors(f"error: {text}")[0]
    stacks = reports[-1].with_name(f"rank-{error.rank:05d}.txt") if error.rank is not None else reports[-1]
    return Diagnosis(error.line, error.rank, error.node, stacks if stacks.exists() else reports[-1], text)


def _asked(scene: _Scene) -> Diagnosis:
    """Of a start that wants to go on."""
    event = scene.told_of("job")
    cause = event.what if event else ""
    if not cause and STEP_ENDED in scene.part and ASKED not in scene.part:  # the script was not asked: for another job
        cause = "Slurm ended its processes, as when another job preempts it"
    lines = _tail(scene.logs[0]).splitlines() if 0 in scene.logs else []
    line = next((line.strip() for line in reversed(lines) if STOPPING in line), "")
    saved = ", and saved" if line and NOT_SAVED not in line else ""
    return Diagnosis(f"it was asked to stop{f' ({cause})' if cause else ''}{saved}",
                     log=scene.logs.get(0, scene.batch), text=line, failed=False)


def _by_errors(scene: _Scene) -> Diagnosis | None:
    """By the last errors in the logs of the processes; None where they tell none, or Slurm tells more."""
    found, last = scene.errors, scene.last
    hangs = [error for error in last.values() if error.kind == HANGS]
    if hangs:
        return Diagnosis(hangs[0].line, hangs[0].rank, hangs[0].node, scene.logs.get(hangs[0].rank), hangs[0].text)
    named = Counter(error.rank for error in last.values() if error.kind == NAMES_ANOTHER)
    if named:
        return _named(scene, named.most_common(1)[0][0], found, last)
    own = {rank: error for rank, error in last.items() if error.kind == OWN}
    if own:
        rank = scene.first(own)
        alike = sum(error.line == own[rank].line for error in own.values()) - 1
        more = f" ({alike} more processes have the same error)" if alike else ""
        return Diagnosis(f"{_who(rank, scene.node(rank))} failed: {own[rank].line}{more}", rank, scene.node(rank),
                         scene.logs[rank], own[rank].text)
    if not last or scene.told_of("node", "job", "task", "memory"):
        return None  # whom Slurm names comes before those that lost contact
    rank = scene.first(last)
    return Diagnosis("the processes lost contact with each other, and none says why: a node or the network failed, or "
                     f"a process was killed. {_who(rank, scene.node(rank))} noticed it", rank, scene.node(rank),
                     scene.logs[rank], last[rank].text)


def _named(scene: _Scene, rank: int, found: Mapping[int, Sequence[LogError]],
           last: Mapping[int, LogError]) -> Diagnosis:
    """Of a process that others name: its own words where it had any."""
    witness = next(error for error in last.values() if error.kind == NAMES_ANOTHER and error.rank == rank)
    node = scene.node(rank) or witness.node
    mine = [error for error in found.get(rank, ()) if error.kind == OWN]
    if mine:
        return Diagnosis(f"{_who(rank, node)} failed: {mine[-1].line}", rank, node, scene.logs[rank], mine[-1].text)
    told = [event for event in scene.told
            if event.kind in ("memory", "node") or (event.kind == "task" and event.rank == rank)]
    why = f"it {KILLED_FOR_MEMORY}" if any(event.memory for event in told) else told[0].what if told else ""
    return Diagnosis(f"{_who(rank, node)} failed: {witness.line}{f'. Slurm says: {why}' if why else ''}", rank, node,
                     scene.logs.get(rank), "\n".join([witness.text, *(event.line for event in told)]))


def _by_events(scene: _Scene, *kinds: str) -> Diagnosis | None:
    """By what Slurm says, the first kind first: why it ended the job, or which process was the first to end."""
    event = next((event for kind in kinds if (event := scene.told_of(kind))), None)
    if event is None:
        return None
    if event.kind == "task":  # one that only lost contact ended because of another
        event = next((each for each in scene.told if each.kind == "task" and each.rank not in scene.last), event)
    if event.rank is None:
        return Diagnosis(event.what, node=event.node, log=scene.batch, text=_end(scene))
    what = KILLED_FOR_MEMORY if any(each.memory for each in scene.told) else event.what
    words = f"{what} without a word of its own"
    if event.rank in scene.last:
        words = f"{what}: {scene.last[event.rank].line}"
    elif event.rank not in scene.logs and scene.own:  # it failed before it had a log, and spoke to srun
        words = f"failed: {scene.own.line}"
    return Diagnosis(f"{_who(event.rank, event.node)} {words}", event.rank, event.node,
                     scene.logs.get(event.rank, scene.batch), _end(scene))


def _without_reason(scene: _Scene) -> Diagnosis:
    code = scene.start.code
    why = f": {scene.own.line}" if scene.own and not scene.logs else ", and no log says why"
    return Diagnosis(f"it ended with exit code {code} ({in_words(code)}){why}", log=scene.batch, text=_end(scene))


def _without_end(scene: _Scene, slurm: str) -> Diagnosis:
    reason = f": {slurm}" if slurm else ", as when a node fails or the batch script is killed"
    return Diagnosis(f"no end of it is recorded{reason}", node=next(iter(expand(scene.start.nodes)), ""),
                     log=scene.batch, text=_end(scene))


def _end(scene: _Scene) -> str:
    """What the batch script and Slurm said last, without what the preflight found in order."""
    lines = [line for line in scene.part.splitlines() if not _IN_ORDER.match(line)]
    return "\n".join(lines[-SHOWN_LINES:])


def _who(rank: int, node: str) -> str:
    return f"rank {rank} on {node}" if node else f"rank {rank}"


def _tail(path: Path) -> str:
    return last_bytes(path, TAIL_BYTES).decode(errors="replace")

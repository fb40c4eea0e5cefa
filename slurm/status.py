"""grn-scale slurm status: how a job stands, how far it has come, and every start with its end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.slurm.progress import progress_of
from grn_scale.slurm.records import submissions
from grn_scale.slurm.standing import Standing, standing_of
from grn_scale.slurm.starts import DECISIONS, Start, in_words
from grn_scale.slurm.times import clock, duration

SHOWN_STARTS = 20
"""Of an array with many elements there are thousands; --json has them all."""
SHOWN_RANKS = 16
PLAIN_WIDTH = 140
"""Columns where stdout is no terminal."""


def document(standing: Standing, earlier: int, now: float) -> dict[str, Any]:
    """All that is known, as plain values. earlier: submissions of the run before this one."""
    submission = standing.submission
    return {"run": submission.facts["run"], "kind": submission.kind, "name": submission.facts["name"],
            "submission": str(submission.folder), "earlier_submissions": earlier, "time": now,
            "state": standing.state, "detail": standing.detail, "job_ids": submission.job_ids,
            "slurm_problem": standing.queue.problem or None,
            "jobs": [{"id": entry.id, **asdict(entry)} for entry in standing.queue.entries],
            "elements": standing.elements, "restarts": _restarts(standing),
            "starts": [{**asdict(start), "runs": standing.runs(start)} for start in standing.starts],
            "progress": progress_of(submission, now)}


def _restarts(standing: Standing) -> int:
    """Starts beside the first one of the job or of each element."""
    return len(standing.starts) - len({start.task for start in standing.starts})


def show(values: Mapping[str, Any], standing: Standing) -> None:
    """Print the document for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(values, standing):
        facts.add_row(name, Text(text))
    console.print(facts)
    if not standing.starts:
        return
    table = Table("start", "began", "ran", "nodes", "progress", "exit code", "then", box=box.SIMPLE, pad_edge=False)
    hidden = max(0, len(standing.starts) - SHOWN_STARTS)
    for start in standing.starts[hidden:]:
        table.add_row(*map(Text, _row(start, standing.runs(start), values["time"])))
    console.print(table)
    if hidden:
        console.print(f"{hidden} earlier starts are left out; --json has them all")


def _facts(values: Mapping[str, Any], standing: Standing) -> Iterator[tuple[str, str]]:
    """Name and text of each line above the table."""
    earlier = values["earlier_submissions"]
    yield "run", f"{values['run']} ({values['kind']}, {values['name']})"
    yield "records", values["submission"] + (f"; earlier submissions: {earlier}" if earlier else "")
    yield "state", values["state"] + (f": {values['detail']}" if values["detail"] else "")
    if standing.elements is not None:
        yield "elements", ", ".join(f"{count} {state}" for state, count in standing.elements.items())
    else:
        yield from (("job", _job(entry)) for entry in standing.queue.active)
    if not standing.queue.active and values["job_ids"]:
        yield "jobs", " ".join(values["job_ids"])
    if standing.queue.problem:
        yield "Slurm", f"cannot be asked: {standing.queue.problem}; this is what the files tell"
    progress = values["progress"]
    if values["kind"] == "train":
        yield "training", _training(progress)
        if progress["health"] and _of_this_start(progress["health"], standing, values["time"]):
            yield "health", _health(progress["health"])
    elif values["kind"] == "tokenize":
        yield "tokenizing", _tokenization(progress)
    yield "restarts", str(values["restarts"])


def _of_this_start(health: Mapping[str, Any], standing: Standing, now: float) -> bool:
    """Whether the file was written by a start that runs, and not by one before."""
    written = now - health["age_seconds"]
    return any(standing.runs(start) is not False and written >= start.at for start in standing.starts)


def _job(entry: Any) -> str:
    text = f"{entry.id} {entry.state}"
    if entry.nodes:
        text += f" on {entry.nodes}"
    if entry.reason and entry.state == "PENDING":
        text += f" ({entry.reason})"
    if entry.state == "PENDING" and entry.starts:
        text += f", expected to start at {clock(entry.starts)}"
    if entry.state == "RUNNING" and entry.ends:
        text += f", until {clock(entry.ends)} at most"
    return text


def _training(values: Mapping[str, Any]) -> str:
    steps = values["steps"]
    if values["step"] is None:
        return "no step yet" + (f" of {steps:,}" if steps else "")
    text = f"step {values['step']:,}" + (f" of {steps:,} ({values['step'] / steps:.1%})" if steps else "")
    text += f", loss {values['loss']:.4f}" if values["loss"] is not None else ", loss not finite"
    if values["tokens_per_second"] is not None:
        text += f", {values['tokens_per_second']:,.0f} tokens/s"
    text += f", MFU {values['mfu']:.1%}" if values["mfu"] is not None else ""
    if values["seconds_left"]:
        text += f", {duration(values['seconds_left'])} of training left"
    return f"{text}; last step {duration(values['row_age_seconds'])} ago"


def _health(values: Mapping[str, Any]) -> str:
    silent = values["silent"]
    ranks = ", ".join(map(str, silent[:SHOWN_RANKS])) + (" ..." if len(silent) > SHOWN_RANKS else "")
    quiet = f"silent are {len(silent)} of them: ranks {ranks}" if silent else "none of them silent"
    return f"{values['state']}, {values['world_size']} processes, {quiet}; {duration(values['age_seconds'])} ago"


def _tokenization(values: Mapping[str, Any]) -> str:
    if values["chunks"] is None:
        return "no status yet"
    text = (f"{values['state']}, {values['chunks']:,} of {values['chunks_in_all']:,} chunks, "
            f"{values['clips_per_second']:.1f} clips/s, {values['workers']} workers, {values['bad_lines']:,} bad lines")
    if values["seconds_left"]:
        text += f", {duration(values['seconds_left'])} left"
    return f"{text}; {duration(values['age_seconds'])} ago"


def _row(start: Start, runs: bool | None, now: float) -> tuple[str, ...]:
    """Cells of the table."""
    if start.began is None:
        ran, ended = "", "refused to start"
    elif start.ended is not None:
        ran, ended = duration(start.ended - start.began), f"{start.code}: {in_words(start.code)}"
    else:
        ran = duration(now - start.began) if runs else ""
        ended = {True: "runs", False: "died without a word", None: "no end is recorded"}[runs]
    after = start.progress_before if start.progress is None else start.progress
    reached = f"{start.progress_before:,} to {after:,}" if start.ended is not None else f"from {after:,}"
    return (start.name, clock(start.at), ran, start.nodes, reached, ended,
            DECISIONS.get(start.decision, start.decision) if start.decision else "")


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale slurm status argv...`."""
    parser = CommandParser("slurm status", "Say how the newest job of a run stands: Slurm's state, progress, and every "
                           "start with its end.", "grn-scale slurm status runs/first", configured=False, json=True)
    parser.add_argument("run", metavar="RUN", help="output folder of the job, or its folder of records")
    options = parser.parse_options(argv)
    start_logging()
    known, now = submissions(options.run), time.time()
    standing = standing_of(known[-1])
    values = document(standing, len(known) - 1, now)
    if options.json:
        print(json.dumps(values, indent=2))
    else:
        show(values, standing)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

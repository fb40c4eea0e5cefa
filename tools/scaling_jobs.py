"""The jobs of a scaling study: how each cell stands, which to submit, and what all cells measured."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_bytes
from grn_scale.command_line import config_yaml
from grn_scale.config.cluster import Cluster
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError
from grn_scale.slurm import submit as jobs
from grn_scale.slurm.records import newest, records_of
from grn_scale.slurm.standing import FINISHED, standing_of
from grn_scale.studies.results import MEASURED
from grn_scale.studies.study import Cell, Study, site_file
from grn_scale.studies.study_file import Size
from grn_scale.tools.scaling_records import ORIGIN, measured, origin

MISSING, WAITING, FAILED = "missing", "in the queue", "failed"
WORDS = {"PENDING": "waiting", "RUNNING": "running"}
"""Of Slurm's states, those that are told otherwise."""
POLL_SECONDS = 2.0

log = logging.getLogger("grn_scale.scaling")


def state_of(study: Study, cell: Cell) -> tuple[str, str, Path | None]:
    """State of a cell (measured, in the queue, failed, missing), why, and its newest attempt."""
    attempts = _submitted(study, cell)
    if not attempts:
        return MISSING, "never submitted", None
    return *_outcome(study, cell, attempts[-1]), attempts[-1]


def _submitted(study: Study, cell: Cell) -> list[Path]:
    return [path for path in study.attempts(cell) if records_of(path).is_dir()]


def _outcome(study: Study, cell: Cell, attempt: Path) -> tuple[str, str]:
    """State of an attempt, and why."""
    standing = standing_of(newest(attempt))
    if standing.active:
        return WAITING, standing.state
    if standing.state != FINISHED:
        told = standing.detail.startswith(standing.state)
        return FAILED, standing.detail if told else f"{standing.state} {standing.detail}".strip()
    try:
        measured(study, cell, attempt)
    except UserError as error:
        return FAILED, str(error)
    return MEASURED, ""


def collected(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each cell, with provenance, and the rows of all measured steps. UserError where no cell has ended."""
    states = [state_of(study, cell) for cell in study.cells]
    _check_ended(study, states)
    rows, steps = [], []
    for cell, (state, reason, attempt) in zip(study.cells, states):
        row: dict[str, Any] = {
            "cell": cell.name, "series": cell.series, "size": cell.size.label, "processes": cell.size.processes,
            "repeat": cell.repeat, "state": state, "reason": reason, "config_sha256": cell.config_sha256,
            "failed_before": "; ".join(f"{each.name}: {_outcome(study, cell, each)[1]}"
                                       for each in _submitted(study, cell)[:-1]),
            **(origin(attempt) if attempt else dict.fromkeys(ORIGIN)),
            **{f"set.{key}": str(value) for key, value in {**study.file.set, **cell.values}.items()}}
        if state == MEASURED and attempt is not None:
            found, taken = measured(study, cell, attempt)
            row |= found
            steps += [{"cell": cell.name, **each, "warmup": each["step"] <= study.file.warmup_steps} for each in taken]
        rows.append(row)
    return rows, steps


def _check_ended(study: Study, states: Sequence[tuple[str, str, Path | None]]) -> None:
    if any(state not in (MISSING, WAITING) for state, _, _ in states):
        return
    submit = f"`grn-scale scaling submit {study.folder} --cluster FILE.yaml --submit`"
    waiting = Counter(reason for state, reason, _ in states if state == WAITING)
    if not waiting:
        raise UserError(f"no cell of {study.folder} has been submitted: {submit} does it")
    counts = ", ".join(f"{count} {WORDS.get(reason, reason)}" for reason, count in waiting.items())
    missing = len(states) - waiting.total()
    rest = f", {missing} never submitted ({submit} runs them)" if missing else ""
    raise UserError(f"no cell of {study.folder} has ended: {counts}{rest}; collect again later")


def submit_missing(study: Study, cluster_file: str, what: str, more: list[str], limit: int, wait: bool) -> int:
    """Show, try or submit the jobs of cells without a result; the exit code. more: further options of each job."""
    cluster_file = cluster_file or os.environ.get(jobs.CLUSTER_VARIABLE, "")
    if not cluster_file:
        raise ConfigError(f"which cluster? Give --cluster FILE, or set {jobs.CLUSTER_VARIABLE}")
    cluster = Cluster.load(cluster_file)
    for cell in study.cells:
        study.config_of(cell)
    states = {cell.name: state_of(study, cell)[0] for cell in study.cells}
    # all cells once and then again: what changes over the hours falls on all alike
    todo = sorted((cell for cell in study.cells if states[cell.name] in (MISSING, FAILED)),
                  key=lambda cell: cell.repeat)
    log.info("%d cells to run, %d in the queue, %d measured", len(todo), list(states.values()).count(WAITING),
             list(states.values()).count(MEASURED))
    placed = {cell.name: place(cell.size, cluster) for cell in todo}  # all are refused before any is submitted
    if todo:
        _check_options(study, todo[0], *placed[todo[0].name], more)
    taken = _submit(study, todo, placed, what, more, limit)
    while wait and _waiting(study):
        time.sleep(POLL_SECONDS)
    lost = [cell.name for cell in study.cells if wait and state_of(study, cell)[0] != MEASURED]
    if lost:
        log.warning("without a result: %s; submit again to run them afresh", ", ".join(lost))
    return EXIT_FAILED if lost or not taken else 0


def _check_options(study: Study, cell: Cell, nodes: int, site: Cluster, more: list[str]) -> None:
    """ConfigError where no job of the study could have the further options, told once instead of for each cell."""
    with contextlib.redirect_stdout(io.StringIO()):
        _job(study, cell, nodes, site, "--print", more)


def _submit(study: Study, todo: Sequence[Cell], placed: Mapping[str, tuple[int, Cluster]], what: str, more: list[str],
            limit: int) -> bool:
    """Whether every cell's job was taken; where one is not, the others may run. A reason that several share is told
    once."""
    taken = True
    refused: dict[str, list[str]] = {}
    for cell in todo:
        while limit and _waiting(study) >= limit:
            time.sleep(POLL_SECONDS)
        try:
            taken &= not _job(study, cell, *placed[cell.name], what, more)
        except UserError as error:
            same = refused.setdefault(str(error).replace(str(study.cell_folder(cell)), ""), [])
            same.append(cell.name)
            if len(same) == 1:
                log.error("%s: %s", cell.name, error)
    for first, *others in refused.values():
        if others:
            log.error("refused for the same reason as %s: %s", first, ", ".join(others))
    return taken and not refused


def _job(study: Study, cell: Cell, nodes: int, site: Cluster, what: str, more: list[str]) -> int:
    """Exit code of showing, trying or submitting a cell's next attempt; UserError where it is refused."""
    attempt = study.cell_folder(cell) / f"attempt-{len(study.attempts(cell)) + 1:04d}"
    with tempfile.TemporaryDirectory() as folder:
        there = study.cell_folder(cell) if what == "--submit" else Path(folder)
        file = there / site_file(attempt).name
        write_bytes(file, config_yaml(site).encode())
        return jobs.main("train", [
            "--config", str(study.config_of(cell)), f"output={attempt}", "--cluster", str(file), "--nodes", str(nodes),
            "--start-limit", "1", "--name", cell.name, *more, what])


def place(size: Size, cluster: Cluster) -> tuple[int, Cluster]:
    """Nodes of a job of this size, and the site with as many processes a node as it takes there. ConfigError where
    nodes of this site cannot hold it evenly."""
    share = cluster.gpus_per_node or cluster.processes_per_node
    each = size.per_node or min(size.processes, share)
    if not each:
        raise ConfigError(f"how many processes has a node of cluster {cluster.name}? Set gpus_per_node or "
                          "processes_per_node in its file, or write sizes as 2x4 (nodes x processes) in the study")
    if share and each > share:
        raise ConfigError(f"{size.label} processes: a node of cluster {cluster.name} has {share}, not {each}")
    if size.processes % each:
        raise ConfigError(f"{size.label} processes do not fill nodes of {share} on cluster {cluster.name}: take "
                          "multiples of what a node has, or write sizes as 2x4 (nodes x processes) in the study")
    count = "gpus_per_node" if cluster.gpus_per_node else "processes_per_node"
    return size.processes // each, replace(cluster, **{count: each})


def _waiting(study: Study) -> int:
    newest_attempts = [attempts[-1] for cell in study.cells if (attempts := _submitted(study, cell))]
    return sum(standing_of(newest(attempt)).active for attempt in newest_attempts)

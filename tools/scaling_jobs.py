"""The jobs of a scaling study: how each cell stands, which to submit, and what its runs left."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from grn_scale.config.cluster import Cluster
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError
from grn_scale.slurm import submit as jobs
from grn_scale.slurm.records import newest, records_of
from grn_scale.slurm.standing import FINISHED, standing_of
from grn_scale.studies.results import MEASURED, measure
from grn_scale.studies.study import CONFIG, Cell, Study
from grn_scale.train.metrics import FILE_NAME, read_metrics

MISSING, WAITING, FAILED = "missing", "in the queue", "failed"
POLL_SECONDS = 2.0

log = logging.getLogger("grn_scale.scaling")


def state_of(study: Study, cell: Cell) -> tuple[str, str, Path | None]:
    """State of a cell (measured, in the queue, failed, missing), why, and its newest attempt."""
    attempts = [path for path in study.attempts(cell) if records_of(path).is_dir()]
    if not attempts:
        return MISSING, "never submitted", None
    attempt = attempts[-1]
    standing = standing_of(newest(attempt))
    if standing.active:
        return WAITING, standing.state, attempt
    if standing.state == FINISHED:
        return MEASURED, "", attempt
    return FAILED, f"{standing.state} {standing.detail}".strip(), attempt


def submit_missing(study: Study, cluster_file: str, what: str, limit: int, wait: bool) -> int:
    """Show, try or submit the jobs of cells without a result; the exit code."""
    cluster_file = cluster_file or os.environ.get(jobs.CLUSTER_VARIABLE, "")
    if not cluster_file:
        raise ConfigError(f"which cluster? Give --cluster FILE, or set {jobs.CLUSTER_VARIABLE}")
    cluster = Cluster.load(cluster_file)
    states = {cell.name: state_of(study, cell)[0] for cell in study.cells}
    todo = [cell for cell in study.cells if states[cell.name] in (MISSING, FAILED)]
    log.info("%d cells to run, %d in the queue, %d measured", len(todo), list(states.values()).count(WAITING),
             list(states.values()).count(MEASURED))
    sizes = {cell.name: sizes_of(cell.processes, cluster) for cell in todo}  # all are refused before any is submitted
    refused: list[str] = []
    for cell in todo:
        while limit and _waiting(study) >= limit:
            time.sleep(POLL_SECONDS)
        attempt = study.cell_folder(cell) / f"attempt-{len(study.attempts(cell)) + 1:04d}"
        try:
            code = jobs.main("train", [
                "--config", str(study.cell_folder(cell) / CONFIG), f"output={attempt}", "--cluster", cluster_file,
                *sizes[cell.name], "--start-limit", "1", "--name", cell.name, what])
        except UserError as error:  # the others may run
            log.error("%s: %s", cell.name, error)
            code = EXIT_FAILED
        if code:
            refused.append(cell.name)
    while wait and _waiting(study):
        time.sleep(POLL_SECONDS)
    lost = [cell.name for cell in study.cells if wait and state_of(study, cell)[0] != MEASURED]
    if lost:
        log.warning("without a result: %s; submit again to run them afresh", ", ".join(lost))
    return EXIT_FAILED if lost or refused else 0


def sizes_of(processes: int, cluster: Cluster) -> list[str]:
    """Options of a job with so many processes; ConfigError where nodes of this cluster cannot hold them evenly."""
    share = cluster.gpus_per_node or cluster.processes_per_node
    if share and cluster.gpus_per_node and processes < share:
        return ["--nodes", "1", "--gpus-per-node", str(processes)]
    if not share or processes % share:
        raise ConfigError(f"{processes} processes do not fill nodes of {share} on cluster {cluster.name}: take "
                          "multiples of what a node has, or set gpus_per_node or processes_per_node in its file")
    return ["--nodes", str(processes // share)]


def collected(study: Study) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each cell, with provenance, and the rows of all measured steps."""
    rows, steps = [], []
    for cell in study.cells:
        state, reason, attempt = state_of(study, cell)
        row: dict[str, Any] = {"cell": cell.name, "series": cell.series, "processes": cell.processes,
                               "repeat": cell.repeat, "state": state, "reason": reason, **_origin(attempt)}
        row |= {f"set.{key}": str(value) for key, value in {**study.file.set, **cell.values}.items()}
        if state == MEASURED and attempt is not None:
            found = read_metrics(attempt / FILE_NAME)
            try:
                row |= measure(found, study.file.warmup_steps)
            except UserError as error:
                row |= {"state": FAILED, "reason": str(error)}
            steps += [{"cell": cell.name, **each, "warmup": each["step"] <= study.file.warmup_steps} for each in found]
        rows.append(row)
    return rows, steps


def _origin(attempt: Path | None) -> dict[str, Any]:
    """Where a run comes from: code, versions, job, nodes and times; None for what is not known."""
    names = ("attempt", "commit", "dirty", "python", "torch", "nodes", "job", "cluster", "began", "ended")
    if attempt is None:
        return dict.fromkeys(names)
    submission = newest(attempt)
    facts, starts = submission.facts, standing_of(submission).starts
    last, git = (starts[-1] if starts else None), facts.get("git") or {}
    versions = facts.get("versions") or {}
    values = (attempt.name, git.get("commit"), git.get("dirty"), versions.get("python"), versions.get("torch"),
              last.nodes if last else None, last.id if last else None, facts.get("cluster"),
              last.began if last else None, last.ended if last else None)
    return dict(zip(names, values))


def _waiting(study: Study) -> int:
    return sum(state_of(study, cell)[0] == WAITING for cell in study.cells)

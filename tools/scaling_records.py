"""What the runs of a scaling study left: their measurements, and where each comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grn_scale.config.load import changes, read_mapping
from grn_scale.errors import UserError
from grn_scale.pretrain.train import SURROUNDINGS
from grn_scale.slurm.records import newest
from grn_scale.slurm.standing import standing_of
from grn_scale.studies.results import measure
from grn_scale.studies.study import CONFIG, Cell, Study, site_file
from grn_scale.train.metrics import FILE_NAME, read_metrics

ORIGIN = ("attempt", "job", "cluster", "nodes", "node_count", "processes_per_node", "gpus_per_node", "gpu", "cpu",
          "cores", "interconnect", "network_gigabytes_per_second", "driver", "cuda", "nccl", "torch", "megatron_core",
          "deepspeed", "grn_scale", "python", "system", "image", "commit", "dirty", "submitted", "began", "ended")
"""Columns of a row that say where it comes from; None for what is not known."""
INTERCONNECT = ("NCCL_", "GLOO_", "UCX_", "FI_")
"""Beginnings of the variables by which a cluster file says how processes reach each other."""


def measured(study: Study, cell: Cell, attempt: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(what the finished run of a cell measured, its steps). UserError where it ran something else than the cell, or
    was interrupted."""
    planned = read_mapping(study.config_of(cell), "config")
    done = read_mapping(attempt / CONFIG, "config")
    other = changes({**planned, "output": ""}, {**done, "output": ""})
    if other:
        raise UserError("it ran another configuration than its cell: " + "; ".join(
            f"{key} {change}" for key, change in other.items()))
    steps = read_metrics(attempt / FILE_NAME)
    return measure(steps, study.file.warmup_steps), steps


def origin(attempt: Path) -> dict[str, Any]:
    """Where a run comes from: code, versions, machine, job and times."""
    submission = newest(attempt)
    facts, starts = submission.facts, standing_of(submission).starts
    last, git = (starts[-1] if starts else None), facts.get("git") or {}
    around = _json(attempt / SURROUNDINGS)
    hardware, versions = around.get("hardware", {}), around.get("versions", {})
    before = facts.get("versions") or {}
    found = {
        "attempt": attempt.name, "job": last and last.id, "cluster": facts.get("cluster"), "nodes": last and last.nodes,
        "node_count": facts.get("nodes"), "processes_per_node": facts.get("processes_per_node"),
        "gpus_per_node": facts.get("gpus_per_node"), "gpu": next(iter(hardware.get("gpus", [])), None),
        "cpu": hardware.get("cpu"), "cores": hardware.get("cores"), "interconnect": _interconnect(attempt),
        "network_gigabytes_per_second": last and _network(submission.folder / "preflight" / last.name),
        "driver": around.get("driver"), "image": (facts.get("image") or {}).get("image"),
        "python": versions.get("python") or before.get("python"), "commit": git.get("commit"),
        "dirty": git.get("dirty"), "submitted": facts.get("submitted"), "began": last and last.began,
        "ended": last and last.ended, "system": versions.get("system"), "cuda": versions.get("cuda"),
        "nccl": versions.get("nccl")}
    for name in ("torch", "megatron-core", "deepspeed", "grn-scale"):
        found[name.replace("-", "_")] = versions.get(name) or before.get(name)
    return {name: found[name] for name in ORIGIN}


def _interconnect(attempt: Path) -> str | None:
    file = site_file(attempt)
    variables = read_mapping(file, "site").get("environment", {}) if file.is_file() else {}
    return " ".join(f"{name}={value}" for name, value in variables.items() if name.startswith(INTERCONNECT)) or None


def _network(preflight: Path) -> float | None:
    """GB/s that the nodes' links reached before the start, the least of all nodes."""
    speeds = [result["measured"]["sum_gigabytes_per_second"] for path in preflight.glob("*.json")
              for result in _json(path).get("results", []) if "sum_gigabytes_per_second" in result.get("measured", {})]
    return min(speeds, default=None)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it to go on without what it tells") from error
    return found if isinstance(found, dict) else {}

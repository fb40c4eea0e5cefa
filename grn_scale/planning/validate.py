"""Published figures against predicted ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from grn_scale.errors import ConfigError
from grn_scale.planning import case_text
from grn_scale.planning.case_file import UNREAD
from grn_scale.planning.cases import Case, NotJudged, complete_case
from grn_scale.planning.flops import counted, read_convention
from grn_scale.planning.hardware import Efficiencies
from grn_scale.planning.memory import GIB, memory
from grn_scale.planning.step_time import step_time

THROUGHPUT = {"tokens_per_s_per_gpu": "tokens_per_s_per_gpu", "step_time_s": "step_time_s",
              "measured_tflops_per_gpu": "tflops_per_gpu", "mfu": "mfu", "hfu": "mfu"}
"""Field of a case -> quantity, in the order in which they are judged."""
ORDERED_CASES = 4
"""Of a source, for its order to be judged."""
NO_SOURCE = "no source"


def judge(cases: Sequence[Mapping[str, Any]], reached: Efficiencies) -> dict[str, Any]:
    """{"cases": rows, "summary": ...}: for each case one row of throughput and one of memory where those are
    published, with prediction, error = predicted / published - 1, convention and assumptions, or the reason why it is
    skipped."""
    rows = [row for case in cases for row in judge_case(case, reached)]
    return {"cases": rows, "summary": summary(rows, len(cases))}


def judge_case(case: Mapping[str, Any], reached: Efficiencies) -> list[dict[str, Any]]:
    """The rows of one case."""
    rows = []
    field = throughput_field(case)
    identity = {"name": case["name"], "source": case.get("source") or NO_SOURCE}
    unread = "".join(f"; {field}: {reason}" for field, reason in (case.get(UNREAD) or {}).items())
    if field:
        row = identity | {"quantity": THROUGHPUT[field], "published": case[field]}
        try:
            rows.append(row | throughput(case, field, complete_case(case, reached)))
        except (NotJudged, ConfigError) as error:
            rows.append(row | {"skipped": f"{error}{unread}"})
    if case.get("memory_gb") is not None:
        row = identity | {"quantity": "memory_gb", "published": case["memory_gb"]}
        try:
            rows.append(row | _memory(case, reached))
        except (NotJudged, ConfigError) as error:
            rows.append(row | {"skipped": f"{error}{unread}"})
    nothing = {"quantity": None, "published": None, "skipped": f"neither throughput nor memory published{unread}"}
    return rows or [identity | nothing]


def throughput_field(case: Mapping[str, Any]) -> str | None:
    """The field of a case that is judged, the first of those published; None where it publishes none."""
    return next((field for field in THROUGHPUT if case.get(field) is not None), None)


def throughput(case: Mapping[str, Any], field: str, done: Case) -> dict[str, Any]:
    """Prediction of a published field, its error, the convention applied, and what was assumed."""
    shape, layout = done.shape, done.layout
    seconds = step_time(shape, layout, done.software, done.machine).total
    assumed = dict(done.assumed)
    applied = "none needed: tokens or seconds"
    if field == "tokens_per_s_per_gpu":
        predicted = layout.global_batch * shape.sequence / seconds / layout.gpus
    elif field == "step_time_s":
        predicted = seconds
    else:
        convention, assumption = read_convention(case.get("flops_convention"),
                                                 case.get("measured_tflops_per_gpu") is not None)
        if assumption:
            assumed["flops_convention"] = assumption
        if field in ("mfu", "hfu"):
            convention = replace(convention, hardware=field == "hfu")
        share = layout.recompute_share if layout.recompute == "full" else 0.0
        predicted = counted(shape, convention, share) * layout.global_batch / seconds / layout.gpus / 1e12
        applied = str(convention)
        if field in ("mfu", "hfu"):
            predicted *= 1e12 / case_text.peak(case, done.machine.gpu)
    return {"predicted": predicted, "error": predicted / case[field] - 1, "convention": applied, "assumed": assumed}


def _memory(case: Mapping[str, Any], reached: Efficiencies) -> dict[str, Any]:
    kind = str(case.get("memory_kind") or "").lower()
    unit, said = (GIB, "GiB") if "gib" in kind else (1e9, "GB of 10^9 bytes")
    if "states only" in kind:
        return _states(case, unit, reached)
    done = complete_case(case, reached)
    parts = memory(done.shape, done.layout, done.software)
    predicted = (parts.reserved if "reserved" in kind else parts.total) / unit
    return {"predicted": predicted, "error": predicted / case["memory_gb"] - 1,
            "convention": f"{said}, {'reserved' if 'reserved' in kind else 'in use'}", "assumed": dict(done.assumed)}


def _states(case: Mapping[str, Any], unit: float, reached: Efficiencies) -> dict[str, Any]:
    """Weights, gradients and optimizer of mixed-precision Adam, 2 + 2 + 12 bytes (arXiv 1910.02054, section 3.1)."""
    parameters, shards, stage = case.get("params_b"), case.get("dp") or case.get("n_gpus"), case.get("zero_stage")
    assumed: Mapping[str, str] = {}
    if not parameters or not shards or stage is None:
        done = complete_case(case, reached)
        parameters, shards, stage = done.shape.parameters / 1e9, done.layout.shards, done.layout.zero
        assumed = done.assumed
    held = sum(each / (shards if stage >= since else 1) for each, since in ((2, 3), (2, 2), (12, 1)))
    predicted = held * parameters * 1e9 / unit
    return {"predicted": predicted, "error": predicted / case["memory_gb"] - 1,
            "convention": "weights, gradients and optimizer only", "assumed": dict(assumed)}


def summary(rows: Sequence[Mapping[str, Any]], cases: int) -> dict[str, Any]:
    """Counts, median and 90th percentile of the absolute error for throughput and memory, and how well the order
    within each source of four cases or more is met."""
    judged = [row for row in rows if "skipped" not in row]
    memories = [row for row in judged if row["quantity"] == "memory_gb"]
    speeds = [row for row in judged if row["quantity"] != "memory_gb"]
    return {"counts": {"cases": cases, "rows": len(rows), "judged": len(judged),
                       "throughput": len(speeds), "memory": len(memories), "skipped": len(rows) - len(judged)},
            **_errors(speeds), "throughput": _errors(speeds), "memory": _errors(memories), "order": _order(speeds)}


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    errors = [abs(row["error"]) for row in rows]
    if not errors:
        return {"median": None, "p90": None, "within_15": None, "within_30": None}
    return {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)),
            "within_15": sum(each <= 0.15 for each in errors) / len(errors),
            "within_30": sum(each <= 0.30 for each in errors) / len(errors)}


def _order(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Source -> smallest rank correlation of its quantities with at least four cases; seconds count as speed."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["source"], row["quantity"]].append(row)
    found: dict[str, float] = {}
    for (source, _), mine in groups.items():
        if len(mine) >= ORDERED_CASES and source != NO_SOURCE:  # those are no study
            value = spearman([row["published"] for row in mine], [row["predicted"] for row in mine])
            found[source] = min(value, found.get(source, 1.0))
    return found


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation, ties sharing their mean rank (Spearman 1904); 0 where one side is all equal."""
    a, b = _ranks(left), _ranks(right)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return round(float(np.corrcoef(a, b)[0, 1]), 12)  # 0.8 is 0.8


def _ranks(values: Sequence[float]) -> np.ndarray:
    order = np.array(values, dtype=float)
    return np.array([(order < each).sum() + ((order == each).sum() - 1) / 2 for each in order])

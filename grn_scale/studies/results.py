"""What the runs of a study measured: a row for each cell, and for each series and number of processes."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import atomic_file, write_bytes
from grn_scale.errors import UserError
from grn_scale.keyed import uniform

MEASURED = "measured"
TABLE, CSV, STEPS = "results.parquet", "results.csv", "steps.jsonl"
DATA_BOUND = 0.1
"""Share of a step's time waiting for data above which a cell is flagged."""
SLOWDOWN = 0.9
"""Throughput of the last third over that of the first below which a cell is flagged."""
WIDE = 0.15
"""Half the distance of the quartiles over the median above which a cell is flagged."""
STRAGGLER = 1.3
"""Slowest over median of a comparison between ranks above which a cell is flagged (as watchdog.straggler_ratio)."""
_MEDIANS = ("step_seconds", "data_wait_seconds", "forward_backward_seconds", "optimizer_seconds",
            "model_tflops_per_second", "mfu", "hfu", "fill")
_COMPARED = ("replicas_forward_backward", "ranks_probe")
SAMPLES = 1000


def measure(rows: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, Any]:
    """Medians, spread and flags of the steps behind the warm-up. Seconds are per step, throughput is of the whole job.

    UserError where no such step is there.
    """
    steps = [row for row in rows if row["step"] > warmup and "step_seconds" in row]
    if not steps:
        raise UserError(f"no step behind the {warmup} of the warm-up")
    rates = [row["tokens_per_second"] for row in steps]
    found: dict[str, Any] = {
        "steps": len(steps), "tokens_per_second": sum(row["tokens"] for row in steps)
        / sum(row["step_seconds"] for row in steps), "tokens_per_second_median": statistics.median(rates)}
    for key in _MEDIANS:
        values = [row[key] for row in steps if row.get(key) is not None]
        found[key] = statistics.median(values) if values else None
    waits = sum(row["data_wait_seconds"] for row in steps)
    found["data_wait_share"] = waits / sum(row["step_seconds"] for row in steps)
    seconds = [row["step_seconds"] for row in steps]
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    found["step_seconds_low"], found["step_seconds_high"] = low, high
    found["flags"] = "; ".join(_flags(steps, found))
    return found


def _flags(steps: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """What makes a cell suspicious, in words."""
    flags = []
    if found["data_wait_share"] > DATA_BOUND:
        flags.append(f"data-bound: {found['data_wait_share']:.0%} of the time waits for data")
    third = len(steps) // 3
    if third >= 3:
        first, last = (statistics.median(row["tokens_per_second"] / max(row["tokens"], 1) for row in part)
                       for part in (steps[:third], steps[-third:]))
        if last < SLOWDOWN * first:
            flags.append(f"slows down: steps a second fall to {last / first:.0%} over the run (clocks or heat)")
    for key in _COMPARED:
        ratios = [row[f"{key}_max"] / row[f"{key}_median"] for row in steps if row.get(f"{key}_median")]
        if ratios and statistics.median(ratios) > STRAGGLER:
            flags.append(f"straggler: {key} of the slowest is {statistics.median(ratios):.2f} times the median")
    width = (found["step_seconds_high"] - found["step_seconds_low"]) / 2 / found["step_seconds"]
    if width > WIDE:
        flags.append(f"wide spread: half of the steps lie within {width:.0%} of the median, no closer")
    return flags


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each series and number of processes that has a measured cell.

    tokens_per_second is the median over repeats, low and high the 95 % interval of a percentile bootstrap over repeats
    (Efron and Tibshirani 1993, chapter 13; None below two repeats). efficiency is throughput a process over that of the
    smallest measured cell of the series, `base`, in processes.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == MEASURED:
            groups.setdefault((row["series"], row["processes"]), []).append(row)
    found: list[dict[str, Any]] = []
    base: dict[str, tuple[int, float]] = {}
    for (series, processes), cells in sorted(groups.items()):
        values = [cell["tokens_per_second"] for cell in cells]
        rate = statistics.median(values)
        first = base.setdefault(series, (processes, rate))
        low, high = _interval(values, series, processes)
        row = {"series": series, "processes": processes, "repeats": len(cells), "tokens_per_second": rate, "low": low,
               "high": high, "efficiency": rate / processes / (first[1] / first[0]), "base": first[0],
               "data_wait_share": statistics.median(cell["data_wait_share"] for cell in cells)}
        for key in _MEDIANS:
            known = [cell[key] for cell in cells if cell.get(key) is not None]
            row[key] = statistics.median(known) if known else None
        found.append(row)
    return found


def _interval(values: Sequence[float], series: str, processes: int) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    medians = sorted(statistics.median(values[int(uniform("study", series, processes, sample, i) * len(values))]
                                       for i in range(len(values))) for sample in range(SAMPLES))
    return medians[int(0.025 * SAMPLES)], medians[int(0.975 * SAMPLES)]


def write_results(folder: Path, rows: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> None:
    """results.parquet, results.csv and steps.jsonl, each whole or as it was."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_file(folder / TABLE) as stream:
        pq.write_table(pa.table({key: [row.get(key) for row in rows] for key in columns}), stream)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(folder / CSV, text.getvalue().encode())
    write_bytes(folder / STEPS, "".join(json.dumps(row) + "\n" for row in steps).encode())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The rows of cells that `write_results` wrote; UserError where there are none."""
    if not (folder / TABLE).is_file():
        raise UserError(f"{folder} has no {TABLE}: collect first, with `grn-scale scaling collect {folder}`")
    import pyarrow.parquet as pq

    return pq.read_table(folder / TABLE).to_pylist()

"""What the runs of a study measured: a row for each cell."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import atomic_file, write_bytes
from grn_scale.errors import UserError

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
MEDIANS = ("step_seconds", "data_wait_seconds", "forward_backward_seconds", "optimizer_seconds",
           "model_tflops_per_second", "mfu", "hfu", "fill")
PEAKS = ("peak_memory_bytes", "peak_reserved_bytes")
_COMPARED = {
    "replicas_forward_backward": "forward and backward of the slowest copy of the model take {:.2f} times as long as "
                                 "those of the median copy",
    "ranks_probe": "the slowest process takes {:.2f} times as long as the median one for the same small computation"}
"""Comparison between ranks (docs/runs.md) -> what a flag says of it."""
SAME = ("commit", "dirty", "torch", "cuda", "nccl", "driver", "gpu", "cpu", "cluster")
"""Columns that cells must share to be compared."""


def measure(rows: Sequence[Mapping[str, Any]], warmup: int) -> dict[str, Any]:
    """Medians, spread and flags of the steps behind the warm-up. Seconds are per step, throughput is of the whole job,
    memory is the peak of the fullest rank.

    UserError where no such step is there, or where the run was interrupted.
    """
    starts = {row["attempt"] for row in rows if row.get("attempt") is not None}
    if len(starts) > 1:
        raise UserError(f"it was interrupted, and went on in {len(starts)} starts: that is no measurement")
    steps = [row for row in rows if row["step"] > warmup and "step_seconds" in row]
    if not steps:
        raise UserError(f"no step behind the {warmup} of the warm-up")
    rates = [row["tokens_per_second"] for row in steps]
    found: dict[str, Any] = {
        "steps": len(steps), "tokens_per_second": sum(row["tokens"] for row in steps)
        / sum(row["step_seconds"] for row in steps), "tokens_per_second_median": statistics.median(rates)}
    for key in MEDIANS:
        values = [row[key] for row in steps if row.get(key) is not None]
        found[key] = statistics.median(values) if values else None
    for key in PEAKS:
        found[key] = max((row[key] for row in steps if row.get(key) is not None), default=None)
    found["peak_memory_of"] = next((row["peak_memory_of"] for row in steps if row.get("peak_memory_of")), None)
    waits = sum(row["data_wait_seconds"] for row in steps)
    found["data_wait_share"] = waits / sum(row["step_seconds"] for row in steps)
    seconds = [row["step_seconds"] for row in steps]
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    found["step_seconds_low"], found["step_seconds_high"] = low, high
    found["flags"] = "; ".join(_flags(steps, found))
    return found


def _flags(steps: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Iterator[str]:
    """What makes a cell suspicious, in words."""
    if found["data_wait_share"] > DATA_BOUND:
        yield f"data-bound: {found['data_wait_share']:.0%} of the time waits for data"
    third = len(steps) // 3
    if third >= 3:
        first, last = (statistics.median(row["tokens_per_second"] / max(row["tokens"], 1) for row in part)
                       for part in (steps[:third], steps[-third:]))
        if last < SLOWDOWN * first:
            yield f"slows down: steps a second fall to {last / first:.0%} over the run (clocks or heat)"
    for key, words in _COMPARED.items():
        ratios = [row[f"{key}_max"] / row[f"{key}_median"] for row in steps if row.get(f"{key}_median")]
        if ratios and statistics.median(ratios) > STRAGGLER:
            yield f"straggler: {words.format(statistics.median(ratios))}"
    width = (found["step_seconds_high"] - found["step_seconds_low"]) / 2 / found["step_seconds"]
    if width > WIDE:
        yield f"wide spread: half of the steps lie within {width:.0%} of the median, no closer"


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What measured cells do not share and should, in words."""
    measured = [row for row in rows if row["state"] == MEASURED]
    found = []
    for key in SAME:
        values = sorted({str(row[key]) for row in measured if row.get(key) is not None})
        if len(values) > 1:
            found.append(f"{key}: {', '.join(values)}")
    return found


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(folder / TABLE).to_pylist()
    except pa.ArrowInvalid as error:
        raise UserError(f"{folder / TABLE} cannot be read ({error}): collect again, with `grn-scale scaling collect "
                        f"{folder}`") from error

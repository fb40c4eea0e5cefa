"""Finished runs as scaling laws see them: parameters, tokens, final loss, and FLOPs where they are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.errors import UserError

REQUIRED = ("params", "tokens", "loss")
TABLES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class FinishedRun:
    """One point of a scaling law. UserError for values that are no positive numbers."""

    name: str
    params: float
    tokens: float
    loss: float
    """At the end of its learning-rate schedule; one kind of loss for all runs."""
    flops: float | None = None
    """Of its training, as counted or measured."""

    def __post_init__(self) -> None:
        for name in (*REQUIRED, "flops"):
            value = getattr(self, name)
            if name == "flops" and value is None:
                continue
            if not isinstance(value, (int, float)) or not (math.isfinite(value) and value > 0):
                raise UserError(f"run {self.name}: {name} is {value!r}, but must be a number above 0: correct it, or "
                                "leave the run out")


def read_table(path: Path) -> list[FinishedRun]:
    """Runs of a CSV, JSONL or Parquet table with the columns params, tokens and loss, and run and flops where they are
    known; other columns are ignored. Raises UserError for what cannot be read as such."""
    import pyarrow

    try:
        table = _reader(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as {path.suffix.removeprefix('.')}: {error}") from error
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}, but a table of runs has run, params, tokens, loss "
                        f"(and flops); its columns are {', '.join(table.column_names)}")
    columns = [name for name in ("run", *REQUIRED, "flops") if name in table.column_names]
    rows = table.select(columns).to_pylist()
    return [_run(path, number, row) for number, row in enumerate(rows, 1)]


def flops_factor(runs: Sequence[FinishedRun]) -> tuple[float, float, float] | None:
    """Median, least and most FLOPs over params x tokens of the runs that tell FLOPs; None where none does."""
    factors = sorted(run.flops / run.params / run.tokens for run in runs if run.flops is not None)
    if not factors:
        return None
    middle = len(factors) // 2
    return (factors[middle] + factors[~middle]) / 2, factors[0], factors[-1]


def _reader(path: Path) -> Any:
    if path.suffix == ".csv":
        from pyarrow.csv import read_csv

        return read_csv(path)
    if path.suffix == ".jsonl":
        from pyarrow.json import read_json

        return read_json(path)
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table as read_parquet

        return read_parquet(path)
    raise UserError(f"{path}: a table of runs ends in {', '.join(TABLES)}; a run folder holds metrics.jsonl and "
                    "config.yaml")


def _run(path: Path, number: int, row: Mapping[str, Any]) -> FinishedRun:
    name = row.get("run")
    return FinishedRun(f"{path.name}, row {number}" if name is None else str(name),
                       row["params"], row["tokens"], row["loss"], row.get("flops"))

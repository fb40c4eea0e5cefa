"""What a study says: throughput, efficiency and their intervals, for each series and size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grn_scale.studies.results import MEASURED, MEDIANS, PEAKS

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval; low and high are None where there are too few repeats to tell."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class _Logs:
    """Logarithms of the repeats of a size."""

    mean: float
    count: int
    variance: float
    """Of the mean; 0 with one repeat."""

    @classmethod
    def of(cls, values: Sequence[float]) -> _Logs:
        logs = [math.log(value) for value in values]
        spread = statistics.variance(logs) / len(logs) if len(logs) > 1 else 0.0
        return cls(statistics.fmean(logs), len(logs), spread)


def mean_interval(values: Sequence[float]) -> Interval:
    """Geometric mean and Student's t interval of the logarithms (Student 1908, Biometrika 6): rates scatter by ratios,
    and the interval of two or three repeats is as wide as so few allow."""
    logs = _Logs.of(values)
    return _interval(logs.mean, logs.variance, logs.count - 1)


def ratio_interval(values: Sequence[float], base: Sequence[float], factor: float) -> Interval:
    """`factor` times the ratio of two geometric means, with Welch's interval (Welch 1947, Biometrika 34)."""
    above, below = _Logs.of(values), _Logs.of(base)
    variance = above.variance + below.variance
    freedom = 0.0
    if min(above.count, below.count) > 1 and variance:
        freedom = variance**2 / sum(each.variance**2 / (each.count - 1) for each in (above, below))
    return _interval(above.mean - below.mean + math.log(factor), variance, freedom)


def _interval(mean: float, variance: float, freedom: float) -> Interval:
    if freedom <= 0:
        return Interval(math.exp(mean))
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each series and size that has a measured cell: series in the order of the study, sizes ascending.

    throughput and efficiency are `Interval`s: tokens a second of the whole job, and throughput a process over that of
    the series' measured cells with the fewest processes, of which `base` is the size. Parts of a step are medians over
    the repeats, memory the most of them.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["state"] == MEASURED:
            groups.setdefault((row["series"], row["size"]), []).append(row)
    base: dict[str, list[Mapping[str, Any]]] = {}
    for (series, _), cells in groups.items():
        if series not in base or cells[0]["processes"] < base[series][0]["processes"]:
            base[series] = cells
    order = list(base)
    return [_line(cells, base[series]) for (series, _), cells in sorted(
        groups.items(), key=lambda item: (order.index(item[0][0]), item[1][0]["processes"]))]


def _line(cells: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = cells[0]
    rates, compared = ([cell["tokens_per_second"] for cell in each] for each in (cells, base))
    alone = Interval(1.0)
    row = {"series": first["series"], "size": first["size"], "processes": first["processes"], "cell": first["cell"],
           "repeats": len(cells), "throughput": mean_interval(rates), "base": base[0]["size"],
           "efficiency": alone if cells is base else ratio_interval(
               rates, compared, base[0]["processes"] / first["processes"]),
           "data_wait_share": statistics.median(cell["data_wait_share"] for cell in cells),
           "peak_memory_of": first.get("peak_memory_of")}
    for key in MEDIANS:
        known = [cell[key] for cell in cells if cell.get(key) is not None]
        row[key] = statistics.median(known) if known else None
    for key in PEAKS:
        row[key] = max((cell[key] for cell in cells if cell.get(key) is not None), default=None)
    return row

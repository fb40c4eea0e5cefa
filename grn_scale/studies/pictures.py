"""The pictures of a study's report, as data URIs of SVG files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grn_scale.studies.predicted import Prediction
from grn_scale.studies.summary import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]
MARKERS = "osD^vPX*<>"
BESIDE = ((0, 10), (10, 0), (0, -11), (-10, 0))
"""Where a number stands beside its point, in points of a page: each series has another side."""
MOST_SERIES = 6
"""In a picture."""
PARTS = {"data_wait_seconds": "waiting for data", "forward_backward_seconds": "forward and backward",
         "optimizer_seconds": "gradient reduction and optimizer", "rest": "everything else"}
COLOURS = ("#d9a441", "#4878a8", "#7fae6f", "#b9b9b9")
LEGEND_INCHES = 0.18
"""Of a row."""
ROOM = 1.15
"""Height of a picture over its highest point. An interval of two repeats may be many times as long; it is cut."""
WIDE = 10
"""Largest over smallest time from which on axes are logarithmic."""
ASIDE = 0.03
"""By which points of neighbouring series stand apart, as a share of the number of processes."""


def few(lines: Lines) -> Iterator[tuple[Lines, str]]:
    """The lines of as many series as a picture can show, with words that say which; empty where it shows all."""
    names = list(dict.fromkeys(line["series"] for line in lines))
    for first in range(0, len(names), MOST_SERIES):
        part = names[first:first + MOST_SERIES]
        which = f" Series {first + 1} to {first + len(part)} of {len(names)}." if len(names) > MOST_SERIES else ""
        yield [line for line in lines if line["series"] in part], which


def throughput(lines: Lines) -> str:
    """Tokens a second over processes, with intervals, and where perfect scaling would be."""
    figure, axes = _axes(lines)
    rates = [line["throughput"].value for line in lines]
    for number, rows, x in _series(lines):
        values: list[Interval] = [row["throughput"] for row in rows]
        _points(axes, number, rows, x, values)
        ideal = [values[0].value * row["processes"] / rows[0]["processes"] for row in rows]
        if len(rows) > 1:
            axes.plot(x, ideal, linestyle=":", color=f"C{number % 10}", linewidth=1)
        rates += ideal
    axes.plot([], [], linestyle=":", color="#555555", linewidth=1, label="perfect scaling")
    axes.set(ylabel="throughput of the whole job (tokens/s)", ylim=(0, ROOM * max(rates)))
    if max(rates) > WIDE * min(rates):
        axes.set(yscale="log", ylim=(min(rates) / 1.5, 1.5 * max(rates)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return _finished(figure, axes)


def efficiency(lines: Lines) -> str:
    """Throughput a process relative to the smallest cell of the series, in percent."""
    figure, axes = _axes(lines)
    most = max(100.0, *(100 * line["efficiency"].value for line in lines))
    for number, rows, x in _series(lines):
        shares = [Interval(*(None if part is None else 100 * part for part in (each.value, each.low, each.high)))
                  for each in (row["efficiency"] for row in rows)]
        _points(axes, number, rows, x, shares)
    axes.axhline(100, linestyle=":", color="#555555", linewidth=1, label="perfect scaling")
    axes.set(ylabel="efficiency (% of the smallest cell's\nthroughput a process)", ylim=(0, ROOM * most))
    return _finished(figure, axes)


def step_parts(lines: Lines) -> str:
    """What the seconds of a step go to, a bar for each series and size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 1.2 + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(lines)
    for colour, (key, label) in zip(COLOURS, PARTS.items()):
        values = [_part(line, key) for line in lines]
        axes.barh(range(len(lines)), values, left=left, label=label, color=colour, height=0.7)
        left = [a + b for a, b in zip(left, values)]
    axes.set_yticks(range(len(lines)), [f"{line['series']}, {line['size']}" for line in lines])
    axes.invert_yaxis()
    axes.set(xlabel="time of a step (s)", ylabel="series, processes")
    return _finished(figure, axes)


def against_plan(found: Sequence[tuple[Mapping[str, Any], Prediction]]) -> str:
    """Measured over predicted seconds of a step; on the diagonal the planner is right."""
    figure, axes = _square()
    lines = [line for line, _ in found]
    for number, series in enumerate(dict.fromkeys(line["series"] for line in lines)):
        points = [(plan.seconds, line["step_seconds"], line["size"]) for line, plan in found
                  if line["series"] == series]
        x, y, sizes = zip(*points) if points else ((), (), ())
        axes.plot(x, y, MARKERS[number % len(MARKERS)], color=f"C{number % 10}", label=series)
        for size, *point in zip(sizes, x, y):
            axes.annotate(size, point, xytext=BESIDE[number % len(BESIDE)], textcoords="offset points", ha="center",
                          va="center", color=f"C{number % 10}", fontsize="small")
    seconds = [each for line, plan in found for each in (plan.seconds, line["step_seconds"])]
    ends = (0.0, ROOM * max(seconds))
    if max(seconds) > WIDE * min(seconds):
        ends = (min(seconds) / 1.5, 1.5 * max(seconds))
        axes.set(xscale="log", yscale="log")
    axes.plot(ends, ends, linestyle=":", color="#555555", linewidth=1, label="predicted = measured")
    axes.set(xlabel="predicted time of a step (s)", ylabel="measured time of a step (s)", xlim=ends, ylim=ends)
    return _finished(figure, axes)


def _part(line: Mapping[str, Any], key: str) -> float:
    if key == "rest":
        return max(0.0, line["step_seconds"] - sum(line[part] or 0.0 for part in PARTS if part != "rest"))
    return line[key] or 0.0


def _series(lines: Lines) -> Iterator[tuple[int, Lines, list[float]]]:
    """(number, rows, where they stand) of each series; neighbours a little apart."""
    names = list(dict.fromkeys(line["series"] for line in lines))
    for number, name in enumerate(names):
        rows = [line for line in lines if line["series"] == name]
        aside = 1 + ASIDE * (number - (len(names) - 1) / 2)
        yield number, rows, [row["processes"] * aside for row in rows]


def _points(axes: Axes, number: int, rows: Lines, x: Sequence[float], values: Sequence[Interval]) -> None:
    errors = [[each.value - (each.low if each.low is not None else each.value) for each in values],
              [(each.high if each.high is not None else each.value) - each.value for each in values]]
    axes.errorbar(x, [each.value for each in values], yerr=errors, marker=MARKERS[number % len(MARKERS)],
                  color=f"C{number % 10}", capsize=3, linewidth=1.4, markersize=5, label=rows[0]["series"])


def _axes(lines: Lines) -> tuple[Figure, Axes]:
    figure, axes = _square()
    sizes = sorted({line["processes"] for line in lines})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlim(sizes[0] / 1.3, sizes[-1] * 1.3)
    axes.set_xlabel("processes (logarithmic)")
    return figure, axes


def _square() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 4.2), layout="constrained")
    return figure, figure.subplots()


def _finished(figure: Figure, axes: Axes) -> str:
    """Legend below, and the figure as a data URI."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    names = axes.get_legend_handles_labels()[1]
    columns = max(1, min(4, 60 // max(map(len, names))))
    figure.set_figheight(figure.get_figheight() + LEGEND_INCHES * -(-len(names) // columns))
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(stream.getvalue()).decode()}"

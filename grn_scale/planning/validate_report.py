"""Published against predicted figures as tables, as a page and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.atomic import atomic_file
from grn_scale.planning.pictures import picture_format

PLAIN_WIDTH = 140
"""Columns of the tables where stdout is no terminal."""
BANDS = (0.15, 0.30)
UNITS = {"tokens_per_s_per_gpu": "tokens/s a GPU", "step_time_s": "s a step", "tflops_per_gpu": "TFLOP/s a GPU",
         "mfu": "MFU", "memory_gb": "GB"}
MARKERS = "osD^v<>pP*Xhd8"
Errors = Mapping[str, Sequence[float]]
"""Source, or what is taken away -> case -> predicted / published - 1, as speed."""


def show(document: Mapping[str, Any]) -> None:
    """Print a table for each source, and the summary."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    for source, rows in _by_source(document).items():
        table = Table("case", "quantity", "published", "predicted", "error", "assumed", box=box.SIMPLE, pad_edge=False,
                      title=source, title_justify="left")
        for row in rows:
            table.add_row(*_cells(row))
        for column in table.columns[2:5]:
            column.justify = "right"
        console.print(table)
    console.print("\n".join(summary_lines(document)), soft_wrap=True)


def summary_lines(document: Mapping[str, Any]) -> list[str]:
    """The summary in words, a line for each fact."""
    summary = document["summary"]
    counts = summary["counts"]
    lines = [f"{counts['cases']} cases, {counts['judged']} figures judged, {counts['skipped']} skipped"]
    for name in ("throughput", "memory"):
        part = summary[name]
        if part["median"] is not None:
            lines.append(f"{name}: {counts[name]} figures, absolute error: median {part['median']:.1%}, nine in ten "
                         f"within {part['p90']:.1%}; {part['within_15']:.0%} within 15 %, {part['within_30']:.0%} "
                         "within 30 %")
    lines += [f"rank correlation {value:.2f}: {source}" for source, value in summary["order"].items()]
    return lines


def page(document: Mapping[str, Any], picture: str, crossed: Errors, gaps: Errors) -> str:
    """The Markdown page: summary, picture, errors on sources left out of the fit and of cases that lack a field, each
    figure, each assumption."""
    lines = ["# Planner against published runs", "",
             "Written by `grn-scale plan validate --cases docs/benchmarks/published_runs.json --report "
             "docs/benchmarks`.",
             "How the model works, and what it assumes: [planner.md](../planner.md).", "",
             *(f"- {line}" for line in summary_lines(document)), "", f"![predicted over published]({picture})", "",
             "## Sources left out", "",
             "The efficiencies were fitted again without each source, and its cases predicted with them.", "",
             "| source | cases | median | worst | mean |", "|---|---|---|---|---|"]
    everything: list[float] = []
    for source, found in crossed.items():
        each = np.array(found)
        everything += np.abs(each).tolist()
        lines.append(f"| {_cell(source)} | {len(each)} | {np.median(np.abs(each)):.1%} | {np.abs(each).max():.1%} | "
                     f"{each.mean():+.1%} |")
    if everything:
        lines += ["", f"All {len(everything)}: median {np.median(everything):.1%}, nine in ten within "
                  f"{np.quantile(everything, 0.9):.1%}, {np.mean(np.array(everything) <= 0.3):.0%} within 30 %."]
    lines += ["", "## What a missing field costs", "",
              "Each field was taken from the cases that state it, and these were predicted again.", "",
              "| missing | cases | median | nine in ten | within 30 % |", "|---|---|---|---|---|"]
    for name, found in gaps.items():
        if each := list(map(abs, found)):
            lines.append(f"| {name} | {len(each)} | {np.median(each):.1%} | {np.quantile(each, 0.9):.1%} | "
                         f"{np.mean(np.array(each) <= 0.3):.0%} |")
    lines += ["", "## Figures", ""]
    for source, rows in _by_source(document).items():
        lines += [f"### {_cell(source)}", "", "| case | quantity | published | predicted | error |",
                  "|---|---|---|---|---|"]
        for row in rows:
            name, quantity, published, predicted, error, _ = _cells(row)
            lines.append(f"| {_cell(name)} | {quantity} | {published} | {_cell(predicted)} | {error} |")
        lines += ["", *_assumptions(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _assumptions(rows: list[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        if row.get("assumed") and row["quantity"] != "memory_gb":
            said = "; ".join(f"{name} {value}" for name, value in row["assumed"].items())
            lines.append(f"- {_cell(row['name'])} ({row['convention']}). Assumed: {_cell(said)}")
    return [*lines, ""] if lines else []


def plot(path: Path, document: Mapping[str, Any]) -> None:
    """Write the picture: predicted over published, both in their own units, a colour and marker for each source.

    ConfigError where matplotlib does not write files that end so.
    """
    from matplotlib.figure import Figure

    kind = picture_format(path)
    panels = [quantity for quantity in UNITS if any(_judged(row, quantity) for row in document["cases"])]
    figure = Figure(figsize=(4.6 * max(1, len(panels)), 8.2), layout="constrained")
    styles = {source: (f"C{number % 10}", MARKERS[number % len(MARKERS)])
              for number, source in enumerate(_by_source(document))}
    handles: dict[str, Any] = {}
    for axes, quantity in zip(np.atleast_1d(figure.subplots(1, max(1, len(panels)))), panels, strict=False):
        rows = [row for row in document["cases"] if _judged(row, quantity)]
        values = [row[name] for row in rows for name in ("published", "predicted")]
        low, high = min(values) / 1.3, max(values) * 1.3
        line = np.array([low, high])
        axes.plot(line, line, color="black", linewidth=1)
        for band, shade in zip(BANDS, (0.25, 0.12), strict=True):
            axes.fill_between(line, line * (1 - band), line * (1 + band), color="gray", alpha=shade, linewidth=0)
        for row in rows:
            color, marker = styles[row["source"]]
            handles[row["source"]] = axes.plot(row["published"], row["predicted"], marker, color=color, markersize=5,
                                               alpha=0.8, linestyle="none")[0]
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=f"{len(rows)} figures",
                 xlabel=f"published, {UNITS[quantity]}", ylabel=f"predicted, {UNITS[quantity]}")
        axes.set_aspect("equal")
        axes.grid(alpha=0.3, which="both")
    figure.suptitle("Predicted over published; bands of 15 % and 30 %")
    figure.legend(handles.values(), [source if len(source) < 90 else source[:87] + "..." for source in handles],
                  loc="outside lower center", ncols=max(1, len(panels) // 2), fontsize="small", frameon=False)
    with atomic_file(path) as stream:
        figure.savefig(stream, format=kind, dpi=110)


def _judged(row: Mapping[str, Any], quantity: str) -> bool:
    return row["quantity"] == quantity and "skipped" not in row


def _by_source(document: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["cases"]:
        found.setdefault(row["source"], []).append(row)
    return found


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    published = "" if row["published"] is None else f"{row['published']:.4g}"
    if "skipped" in row:
        return row["name"], row["quantity"] or "", published, f"skipped: {row['skipped']}", "", ""
    return (row["name"], row["quantity"], published, f"{row['predicted']:.4g}", f"{row['error']:+.1%}",
            ", ".join(row["assumed"]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")

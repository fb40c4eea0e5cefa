"""A fitted scaling law as tables, and as pictures: loss over compute, and over model size at equal compute."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grn_scale.atomic import atomic_file
from grn_scale.planning.scaling_law import COEFFICIENTS, Law
from grn_scale.planning.scaling_runs import FinishedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLAIN_WIDTH = 120
"""Columns of the tables where stdout is no terminal."""
CURVE_POINTS = 200


def show(document: dict[str, Any]) -> None:
    """Print the result as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    style = {"box": box.SIMPLE, "pad_edge": False, "title_justify": "left"}
    intervals = document["bootstrap_samples"] > 0
    between = ("95 % of samples",) if intervals else ()
    table = Table("", "fitted", *between, **style,
                  title=f"loss = E + A / params^alpha + B / tokens^beta, from {document['runs']} runs")
    for name in (*COEFFICIENTS, "params_exponent"):
        value = document["law"][name]
        label = "params of the optimum ~ FLOPs^" if name == "params_exponent" else name
        table.add_row(label, f"{value['value']:.5g}", *([_between(value["interval"])] if intervals else []))
    _right(table)
    console.print(table)
    console.print(f"error of the fit: median {document['median_error']:.2%}, largest {document['largest_error']:.2%} "
                  f"({document['largest_error_run']}); FLOPs = {document['flops_factor']:.4g} x params x tokens",
                  soft_wrap=True)
    between = ("95 %",) if intervals else ()
    table = Table("FLOPs", "largest run x", "params", *between, "tokens", *between, "tokens/param", "loss", *between,
                  **style, title="\nwhat to train for a budget" + (" (95 %: of the samples)" if intervals else ""))
    for row in document["optima"]:
        cells = [f"{row['flops']:.3g}", f"{row['over_largest_run']:.3g}"]
        for name in ("params", "tokens"):
            cells += [short(row[name]["value"]), *([_between(row[name]["interval"])] if intervals else [])]
        cells += [f"{row['tokens_per_parameter']:.3g}", f"{row['loss']['value']:.3f}"]
        if intervals:
            cells.append(" to ".join(f"{bound:.3f}" for bound in row["loss"]["interval"]))
        table.add_row(*cells)
    _right(table)
    console.print(table)


def plot(path: Path, kind: str, law: Law, runs: Sequence[FinishedRun], factor: float, budgets: Sequence[float]) -> None:
    """Write the pictures as one file of this kind (png, svg, pdf). factor: FLOPs = factor x params x tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(f"loss = {law.E:.4g} + {law.A:.4g} / params^{law.alpha:.3f} + {law.B:.4g} / tokens^{law.beta:.3f}, "
                    f"fitted to {len(runs)} runs", fontsize="medium")
    left, right = figure.subplots(1, 2, sharey=True)
    _plot_compute(left, law, runs, factor, budgets)
    _plot_sizes(right, law, runs, factor, budgets)
    with atomic_file(path) as stream:
        figure.savefig(stream, format=kind, dpi=110)


def _plot_compute(axes: Axes, law: Law, runs: Sequence[FinishedRun], factor: float, budgets: Sequence[float]) -> None:
    """Runs, a fitted line for each size, and the lowest loss that any size reaches."""
    from matplotlib import colormaps

    params = np.array([run.params for run in runs])
    flops = factor * params * np.array([run.tokens for run in runs])
    sizes = np.unique(params)
    low, high = flops.min(), max(flops.max(), *budgets)
    logs = np.log(params / params.min()) / max(1e-9, np.log(params.max() / params.min()))
    axes.scatter(flops, [run.loss for run in runs], c=logs, cmap="viridis", s=18, zorder=3)
    for size in sizes if len(sizes) <= 12 else np.geomspace(sizes[0], sizes[-1], 8):
        curve = np.geomspace(low, flops.max(), CURVE_POINTS)
        color = colormaps["viridis"](np.log(size / sizes[0]) / max(1e-9, np.log(sizes[-1] / sizes[0])))
        axes.plot(curve, law.loss(size, curve / factor / size), color=color, linewidth=0.8,
                  label=f"{short(size)} params")
    curve = np.geomspace(low, high, CURVE_POINTS)
    axes.plot(curve, [law.loss(*law.optimum(each, factor)) for each in curve], color="black", linestyle="--",
              label="best size for each budget")
    top = max(run.loss for run in runs)
    axes.set(title="training compute (dots: runs)", xlabel="FLOPs", ylabel="final loss", xscale="log",
             ylim=(None, top + 0.1 * (top - law.loss(*law.optimum(high, factor)))))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _plot_sizes(axes: Axes, law: Law, runs: Sequence[FinishedRun], factor: float, budgets: Sequence[float]) -> None:
    """Loss over model size at equal compute, a line for each budget."""
    optima = [law.optimum(budget, factor)[0] for budget in budgets]
    sizes = [run.params for run in runs]
    curve = np.geomspace(min(*sizes, *optima) / 3, max(*sizes, *optima) * 3, CURVE_POINTS)
    for budget, size in zip(budgets, optima):
        line, = axes.plot(curve, law.loss(curve, budget / factor / curve), linewidth=1)
        best = law.loss(size, budget / factor / size)
        axes.plot(size, best, "*", color=line.get_color(), markersize=12,
                  label=f"{budget:.3g} FLOPs: {short(size)} params, {short(budget / factor / size)} tokens, "
                  f"loss {best:.3f}")
    axes.set(title="equal compute, by model size (star: lowest loss)", xlabel="parameters", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def short(value: float) -> str:
    """Three digits, and K, M, B or T for 10^3, 10^6, 10^9, 10^12."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if unit <= value < 1000 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _between(interval: Sequence[float]) -> str:
    return f"{short(interval[0])} to {short(interval[1])}"


def _right(table: Any) -> None:
    for column in table.columns[1:]:
        column.justify = "right"

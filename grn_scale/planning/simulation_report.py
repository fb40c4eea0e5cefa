"""A simulation as tables, and as pictures: a step of one pipeline, and goodput over the time between saves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grn_scale.atomic import atomic_file
from grn_scale.planning.failures import Failures
from grn_scale.planning.pictures import picture_format
from grn_scale.planning.schedule import Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_TASKS = 8192
"""Of a step that is drawn: more cannot be told apart."""
FORWARD, BACKWARD = "#4878a8", "#d8823c"
CURVE_POINTS = 200
PLAIN_WIDTH = 120
"""Columns of the tables where stdout is no terminal."""
DAY = 86400
PART_NAMES = {
    "work": "forward and backward passes",
    "slow": "slower ranks of a stage",
    "pipeline": "waiting inside the pipeline",
    "replicas": "waiting for the slowest replica",
    "after": "gradient reduction and optimizer",
}


def show(document: dict[str, Any]) -> None:
    """Print the result as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    step, failures = document["step"], document["failures"]
    console.print(_layout(document["layout"]), soft_wrap=True)
    style = {"box": box.SIMPLE, "pad_edge": False, "title_justify": "left"}
    table = Table("a rank's step", "seconds", "share", title=f"mean of {document['replays']} replayed steps", **style)
    for name, seconds in step["parts"].items():
        table.add_row(PART_NAMES[name], f"{seconds:.4g}", f"{seconds / step['seconds']:.2%}")
    table.add_row("step", f"{step['seconds']:.4g}", "", style="bold")
    table.add_row("  if all ranks were even", f"{step['seconds_even_ranks']:.4g}", "")
    table.add_row("  if all packs were, too", f"{step['seconds_even_packs_and_ranks']:.4g}", "")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(f"waiting inside the pipeline over passes: {step['bubble']:.2%} (even packs and ranks, closed form: "
                  f"{step['bubble_closed_form']:.2%})", soft_wrap=True)
    if step["tokens_per_second"] is not None:
        console.print(f"{step['tokens_per_second']:,.0f} tokens/s while it runs ({step['tokens']:,.0f} a step, packs "
                      f"{document['fill']:.2%} full)", soft_wrap=True)
    if run := document["run"]:
        console.print(f"{run['steps']:,} steps take {run['seconds'] / DAY:.3f} days without failures", soft_wrap=True)
    if failures is None:
        return
    length = failures["run_steps"]
    table = Table("interval", "steps", "minutes", "goodput", **style,
                  title=f"\na failure each {failures['mtbf_seconds'] / 3600:.3g} h; goodput: time in steps that count, "
                  "over wall time")
    if length:
        for name in ("days expected", "replayed", "5 % to 95 % of runs"):
            table.add_column(name)
    for row in failures["intervals"]:
        cells = [row["name"], f"{row['steps']:,}", f"{row['seconds'] / 60:.1f}", f"{row['goodput']:.2%}"]
        if length:
            error = row["replayed_standard_error"]
            cells += [f"{row['wall_seconds'] / DAY:.3f}", f"{row['replayed_wall_seconds'] / DAY:.3f}"
                      + ("" if error is None else f" ± {error / DAY:.3f}"),
                      f"{row['replayed_p5_seconds'] / DAY:.3f} to {row['replayed_p95_seconds'] / DAY:.3f}"]
        table.add_row(*cells)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(f"with the best interval {failures['working_share']:.2%} of the wall time are forward and backward "
                  "passes that count", soft_wrap=True)
    if length:
        console.print(f"{length:,} steps take {length * step['seconds'] / DAY:.3f} days without failures and saves; "
                      f"replayed: mean and standard error of {failures['trials']:,} runs", soft_wrap=True)


def _layout(layout: dict[str, Any]) -> str:
    chunks = f" of {layout['virtual']} chunks" if layout["virtual"] > 1 else ""
    return (f"{layout['ranks']:,} ranks: {layout['replicas']:,} replicas of tensor {layout['tensor']} x context "
            f"{layout['context']} x pipeline {layout['pipeline']}{chunks}, {layout['micro_batches']} micro-batches "
            "each")


def plot(path: Path, document: dict[str, Any], tasks: Sequence[tuple[Task, float, float]],
         failures: Failures | None) -> None:
    """Write the pictures of a result into one file.

    tasks: of one pipeline, with begin and end in seconds; none: that picture is left out. failures: None likewise.
    """
    from matplotlib.figure import Figure

    kind = picture_format(path)
    panels = bool(tasks) + (failures is not None)
    figure = Figure(figsize=(11, 4.2 * panels + 0.4), layout="constrained")
    figure.suptitle(f"{_layout(document['layout'])}; a step takes {document['step']['seconds']:.4g} s",
                    fontsize="medium")
    axes = list(np.atleast_1d(figure.subplots(panels)))
    if tasks:
        _plot_tasks(axes.pop(0), tasks)
    if failures is not None:
        marks = [(row["name"], row["seconds"]) for row in document["failures"]["intervals"]]
        _plot_goodput(axes.pop(0), failures, marks)
    with atomic_file(path) as stream:
        figure.savefig(stream, format=kind, dpi=110)


def _plot_tasks(axes: Axes, tasks: Sequence[tuple[Task, float, float]]) -> None:
    """A row a stage, a bar a task; later chunks of a stage are paler."""
    from matplotlib.patches import Patch

    stages = 1 + max(task.stage for task, _, _ in tasks)
    chunks = 1 + max(task.chunk for task, _, _ in tasks)
    end = max(end for _, _, end in tasks)
    for backward, color in ((False, FORWARD), (True, BACKWARD)):
        for chunk in range(chunks):
            mine = [each for each in tasks if each[0].backward == backward and each[0].chunk == chunk]
            axes.barh([task.stage for task, _, _ in mine], [stop - begin for _, begin, stop in mine],
                      left=[begin for _, begin, _ in mine], height=0.9, color=color, edgecolor="white",
                      linewidth=0.4 if len(tasks) < 1000 else 0.1, alpha=1 - 0.6 * chunk / chunks)
    if len(tasks) <= 160:
        for task, begin, stop in tasks:
            axes.text((begin + stop) / 2, task.stage, str(task.micro_batch), ha="center", va="center", fontsize=6)
    axes.set(title=f"one step of one pipeline{' (paler: later chunks of a stage)' if chunks > 1 else ''}",
             xlabel="seconds from the start of the step", ylabel="stage", xlim=(0, end), ylim=(stages - 0.5, -0.5))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(handles=[Patch(color=FORWARD, label="forward"), Patch(color=BACKWARD, label="backward")],
                loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def _plot_goodput(axes: Axes, failures: Failures, intervals: Sequence[tuple[str, float]]) -> None:
    from matplotlib.ticker import LogFormatter

    marked = [seconds for _, seconds in intervals]
    low, high = max(failures.latency, min(marked) / 10, 1e-6), max(marked) * 10
    curve = np.geomspace(low, high, CURVE_POINTS)
    axes.plot(curve / 60, [100 * failures.goodput(seconds) for seconds in curve], color="black", linewidth=1)
    for number, (name, seconds) in enumerate(intervals):
        axes.plot(seconds / 60, 100 * failures.goodput(seconds), "o^sD"[number % 4], markersize=14 - 3 * number,
                  markerfacecolor="none", markeredgewidth=2,
                  label=f"{name}: {seconds / 60:.3g} min, {100 * failures.goodput(seconds):.2f} %")
    axes.set(title=f"goodput; a failure each {failures.mtbf / 3600:.3g} h, saves block for {failures.blocking:g} s",
             xlabel="minutes of training between two saves", ylabel="training steps in % of wall time", xscale="log")
    axes.xaxis.set_major_formatter(LogFormatter())  # 20, not 2 x 10^1
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.grid(alpha=0.3)
    axes.legend()

"""The counts of `manifest stats` for people: tables on stdout, and one picture of four panels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.atomic import atomic_file
from grn_scale.data_pipeline.manifest_spread import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from grn_scale.data_pipeline.manifest_stats import Survey

PLAIN_WIDTH = 160
"""Columns where the output is no terminal, so that nothing is cut off."""
BINS = 40
MEANINGS = {"usable": "clips that nothing known speaks against", "unknown_size": "width and height are not given",
            "unknown_length": "neither range nor duration is given", "without_caption": "nor a class"}
SPREADS = {"seconds": "length (s)", "megapixels": "size (megapixels)", "caption_words": "caption (words)"}


def print_tables(values: dict[str, Any]) -> None:
    """Print `Survey.result()` as tables: counts, spreads, buckets, and why clips are dropped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    counts = Table(box=box.SIMPLE, show_header=False)
    for name in ("clips", "usable", "images", "flipped", "with_class_id", "without_caption", "unknown_size",
                 "unknown_length"):
        counts.add_row(name.replace("_", " "), str(values[name]), MEANINGS.get(name, ""))
    console.print(counts)

    spreads = Table("", "count", "sum", "least", "5 %", "median", "95 %", "most", box=box.SIMPLE)
    for name, title in SPREADS.items():
        spread = values[name]
        cells = ["not given", *[""] * 6] if spread is None else [_figure(spread[key]) for key in (
            "count", "sum", "min", "p5", "median", "p95", "max")]
        spreads.add_row(title, *cells)
    _right(spreads)
    console.print(spreads)
    _print_list(console, "sizes", values["sizes"], values["other_sizes"])
    _print_list(console, "captions by type", values["captions"])

    settings = ", ".join(f"{name} {value}" for name, value in values["settings"].items())
    console.print(f"  buckets with {settings}:" + ("" if values["buckets"] else " no size is known; --probe reads the "
                                                   "media files' headers"))
    buckets = Table("height x width", "ratio", "clips", "cropped, mean", "most", "enlarged", "by, median", "most",
                    "tokens, median", "most", "sum", "cut in time", "too short", "over budget", box=box.SIMPLE)
    _right(buckets)
    for row in values["buckets"]:
        enlarged, tokens = row["enlarged_by"] or {}, row["tokens"] or {}
        buckets.add_row(f"{row['height']} x {row['width']}", str(row["ratio_key"]), str(row["clips"]),
                        f"{row['crop_mean']:.1%}", f"{row['crop_max']:.1%}", str(row["enlarged"]),
                        *(f"{spread[key]:.2f}x" if spread else "" for spread, key in (
                            (enlarged, "median"), (enlarged, "max"))),
                        *(_figure(tokens[key]) if tokens else "?" for key in ("median", "max", "sum")),
                        str(row["cut"]), str(row["too_short"]), str(row["over_budget"]))
    if values["buckets"]:
        console.print(buckets)
    _print_list(console, "dropped", values["dropped"])


def _right(table: Any) -> None:
    for column in table.columns[1:]:
        column.justify = "right"


def _print_list(console: Any, title: str, counts: dict[str, int], others: int = 0) -> None:
    text = ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
    console.print(f"  {title}: {text}{f', others {others}' if others else ''}", soft_wrap=True, markup=False)


def _figure(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.1f}M"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def plot(survey: Survey, path: Path) -> None:
    """Write a PNG: clip lengths, picture sizes, clips by aspect ratio with what is dropped, and caption lengths.

    Raises UserError where the disk is full, OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    settings = survey.settings
    figure = Figure(figsize=(13, 8), layout="constrained")
    (lengths, sizes), (ratios, words) = figure.subplots(2, 2)
    _histogram(lengths, survey.seconds, "clip length", "seconds")
    _mark(lengths, settings.max_frames / settings.fps, f"max_frames {settings.max_frames} at {settings.fps:g} a second")
    _histogram(sizes, survey.megapixels, "picture size", "megapixels")
    _mark(sizes, (settings.latent_side * 16) ** 2 / 1e6, f"latent_side {settings.latent_side}")
    _ratios(ratios, survey)
    _histogram(words, survey.words, "caption length", "words")
    figure.suptitle(f"{survey.clips} clips, {survey.usable} usable")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def _histogram(axes: Axes, spread: Spread, title: str, unit: str) -> None:
    axes.set(title=title, xlabel=unit, ylabel="clips" if unit != "words" else "captions")
    if not spread.counts:
        axes.text(0.5, 0.5, "not given in the manifest", transform=axes.transAxes, ha="center", color="gray")
        return
    values, weights = zip(*sorted(spread.counts.items()))
    axes.hist(values, bins=BINS, weights=weights, color="tab:blue")
    axes.ticklabel_format(axis="y", style="plain")


def _mark(axes: Axes, value: float, label: str) -> None:
    """A line at a limit of the settings."""
    axes.axvline(value, color="tab:orange", linestyle="--", label=label)
    axes.legend(fontsize="small")


def _ratios(axes: Axes, survey: Survey) -> None:
    axes.set(title="clips by bucket", xlabel="height / width", ylabel="clips")
    buckets = {key: count for key, count in survey.buckets.items() if count.clips}
    if not buckets:
        axes.text(0.5, 0.5, "sizes are not given in the manifest", transform=axes.transAxes, ha="center", color="gray")
        return
    names = [f"{key:g}" for key in buckets]
    base = [0] * len(names)
    for label, color, heights in (
            ("usable", "tab:blue", [count.usable for count in buckets.values()]),
            ("too short", "tab:red", [count.too_short for count in buckets.values()]),
            ("over data.token_budget", "tab:orange", [count.over_budget for count in buckets.values()])):
        axes.bar(names, heights, bottom=base, label=label, color=color)
        base = [below + height for below, height in zip(base, heights)]
    axes.tick_params(axis="x", rotation=45)
    axes.legend(fontsize="small")

"""What the demo ends with: where everything lies, how long it took, what was measured; as tables and summary.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_json
from grn_scale.demo import accuracy, reconstruction
from grn_scale.errors import UserError
from grn_scale.train.metrics import FILE_NAME, read_metrics

SUMMARY = "summary.json"
CHANCE = {"color": 1 / 6, "direction": 1 / 4, "both": 1 / 24}
BY_NOISE = ("loss_by_noise", "bit_accuracy_by_noise")
"""A mean for each of ten bins of the share of true labels; validation rows have them with "validation_" in front."""
LAST_STEPS = 50
"""Training steps whose means stand beside the validation: few held-out samples fall into the outer bins."""


def summarize(folder: Path, artifacts: Mapping[str, Path], stages: Mapping[str, Mapping[str, Any]], run: Path,
              measured: Path) -> dict[str, Any]:
    """Plain values, also written to summary.json in `folder`.

    run: run folder of the training; measured: folder with `accuracy.json` and `reconstruction.json`.
    """
    rows = read_metrics(run / FILE_NAME)
    training = [row for row in rows if "loss" in row]
    validations = [row for row in rows if "validation_loss" in row]
    if not training:
        raise UserError(f"{run / FILE_NAME} holds no training step")
    result = {
        "artifacts": {name: str(path) for name, path in artifacts.items()},
        "stage_seconds": {name: record["seconds"] for name, record in stages.items()},
        "seconds": round(sum(record["seconds"] for record in stages.values()), 1),
        "training": {
            "steps": training[-1]["step"], "loss": training[-1]["loss"],
            "tokens_per_second": _median(row["tokens_per_second"] for row in training),
            "step_seconds": _median(row["step_seconds"] for row in training),
            **{f"last_{LAST_STEPS}_steps_{key}": _bin_means([row[key] for row in training[-LAST_STEPS:]])
               for key in BY_NOISE},
        },
        "validation": {"step": validations[-1]["step"], "loss": validations[-1]["validation_loss"],
                       **{key: validations[-1][f"validation_{key}"] for key in BY_NOISE}} if validations else None,
        "reconstruction": _load(measured / reconstruction.RESULT),
        "conditional_accuracy": _load(measured / accuracy.RESULT),
    }
    write_json(folder / SUMMARY, result)
    return result


def print_summary(result: Mapping[str, Any]) -> None:
    """The summary as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("stage", "seconds", title="time", title_justify="left")
    for name, seconds in result["stage_seconds"].items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_row("in all", f"{result['seconds']:.1f}", style="bold")
    console.print(table)

    training = result["training"]
    table = Table("measured", "value", title="results", title_justify="left")
    table.add_row("training", f"{training['steps']} steps, loss {training['loss']:.4f}, "
                              f"{training['tokens_per_second']:,.0f} tokens/s, {training['step_seconds']:.2f} s a step")
    if result["validation"]:
        table.add_row("validation", f"loss {result['validation']['loss']:.4f} nats a label")
    for name, values in result["reconstruction"].items():
        if isinstance(values, dict):
            table.add_row(f"reconstruction, {name.replace('_', ' ')}",
                          f"PSNR {values['psnr_db_mean']:.2f} dB (worst {values['psnr_db_min']:.2f}, "
                          f"{values['clips']} clips)")
    scores = result["conditional_accuracy"]
    for name, chance in CHANCE.items():
        table.add_row(f"asked {name} found", f"{100 * scores[name]['accuracy']:.1f} % ({scores[name]['correct']} of "
                                             f"{scores['clips']}; chance {100 * chance:.1f} %)")
    console.print(table)

    table = Table("share of true labels", "validation loss", "bit accuracy", f"training loss, last {LAST_STEPS} steps",
                  "bit accuracy", title="by noise level", title_justify="left")
    columns = [result["validation"][key] if result["validation"] else None for key in BY_NOISE]
    columns += [training[f"last_{LAST_STEPS}_steps_{key}"] for key in BY_NOISE]
    for row in _noise_rows(columns):
        table.add_row(*row)
    console.print(table)

    table = Table("what", "where", title="artifacts", title_justify="left")
    for name, path in result["artifacts"].items():
        table.add_row(name, path)
    console.print(table)


def _bin_means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean of each bin over the rows that have it."""
    columns = ([value for value in column if value is not None] for column in zip(*rows))
    return [sum(values) / len(values) if values else None for values in columns]


def _noise_rows(columns: Sequence[Sequence[float | None] | None]) -> Iterator[tuple[str, ...]]:
    """Cells of the table by noise level: loss and accuracy in turn, "-" for what was not seen."""
    bins = next(len(column) for column in columns if column is not None)
    for number in range(bins):
        values = [column[number] if column is not None else None for column in columns]
        cells = ["-" if value is None else f"{100 * value:.2f} %" if place % 2 else f"{value:.4f}"
                 for place, value in enumerate(values)]
        yield (f"{number / bins:.1f} to {(number + 1) / bins:.1f}", *cells)


def _median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))

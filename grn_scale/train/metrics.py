"""The record of a run: metrics.jsonl first, then wandb fed from the same rows, and a plot of them.

metrics.jsonl holds one JSON object a line. Every attempt opens with {"event": "start", run, attempt, step, time},
where step is the number of updates it starts from; then comes a row for each logged step: run, attempt, step, time
(Unix seconds) and the values of that step. {"event": "rollback", step} tells that the run went back to a step,
{"event": "spike", step} that it could not. Lines are only ever added: an attempt that resumes from step n, or a
rollback to it, supersedes the rows above n before it, and `read_metrics` leaves those out.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import append_line, atomic_file, drop_unfinished_line
from grn_scale.config.schema import LoggingConfig
from grn_scale.errors import ConfigError, UserError

FILE_NAME = "metrics.jsonl"
Value = float | int | str | None
Values = Mapping[str, Value | Sequence[Value]]


def check_wandb(settings: LoggingConfig) -> None:
    """ConfigError where wandb is asked for and not installed."""
    if settings.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(f"logging.wandb is {settings.wandb!r}, but wandb is not installed: "
                          "pip install wandb, or set logging.wandb=off")


class MetricsLog:
    """Appends the rows of one attempt; a context manager.

    folder: run folder, which must exist. step: updates done before this attempt. writes: true on rank 0 alone;
    elsewhere every call does nothing. config: resolved configuration as plain values, shown by wandb.
    run_id names the run in all its attempts, attempt counts from 1.
    Raises ConfigError, before anything is written, where wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, settings: LoggingConfig, *, writes: bool = True,
                 config: Mapping[str, Any] | None = None) -> None:
        self.path = folder / FILE_NAME
        self.run_id, self.attempt = "", 0
        self._writes = writes
        self._wandb = None
        if not writes:
            return
        check_wandb(settings)
        starts = [row for row in _lines(self.path) if row.get("event") == "start"]
        self.run_id = starts[0]["run"] if starts else uuid.uuid4().hex[:12]
        self.attempt = starts[-1]["attempt"] + 1 if starts else 1
        drop_unfinished_line(self.path)
        self._append(step, {"event": "start"})
        if settings.wandb != "off":
            self._wandb = _start_wandb(folder, self.run_id, settings, config)

    def write(self, step: int, values: Values) -> None:
        """Add the values of `step` (updates done): numbers, text, or lists of them. NaN and infinity become null."""
        if not self._writes:
            return
        row = self._append(step, values)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in _flat(row).items() if key not in ("run", "attempt", "time")})

    def close(self) -> None:
        """Finish the wandb run."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, step: int, values: Values) -> dict[str, Any]:
        row = {"run": self.run_id, "attempt": self.attempt, "step": step, "time": round(time.time(), 3),
               **{key: _json_value(value) for key, value in values.items()}}
        append_line(self.path, json.dumps(row, allow_nan=False))
        return row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One row a step, steps ascending, each from the last time that the run reached it.

    Values that an attempt wrote for one step in several rows (training, validation) come back in one. An unfinished
    last line is left out. Raises UserError for a file that is absent or damaged.
    """
    if not path.is_file():
        raise UserError(f"no metrics at {path}: the run has not written any, or this is not a run folder")
    rows: dict[int, dict[str, Any]] = {}
    for row in _lines(path):
        if row.get("event") in ("start", "rollback"):
            rows = {step: kept for step, kept in rows.items() if step <= row["step"]}
        elif "event" not in row:
            rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]


def past_of_spikes(folder: Path, window: int) -> tuple[list[tuple[int, float]], int]:
    """The last `window` steps that a run goes on from, each with its loss, and how many spikes there have been in all
    its attempts."""
    path = folder / FILE_NAME
    if not path.is_file():
        return [], 0
    losses = [(row["step"], row["loss"]) for row in read_metrics(path) if row.get("loss") is not None]
    return losses[-window:], sum(row.get("event") in ("rollback", "spike") for row in _lines(path))


def plot_metrics(folder: Path, name: str = "metrics.png") -> Path:
    """Path of a PNG in the run folder: loss over steps, and loss and bit accuracy by noise level.

    Reads `loss`, `validation_loss`, `loss_by_noise` and `bit_accuracy_by_noise` of metrics.jsonl, whichever are there.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(folder / FILE_NAME)
    figure = Figure(figsize=(15, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for key, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            left.plot(*zip(*points), label=label, linewidth=1, marker="o" if len(points) == 1 else None)
            left.legend()
    left.set(title="loss", xlabel="step")
    _plot_by_noise(middle, rows, "loss_by_noise", "loss by signal ratio")
    _plot_by_noise(right, rows, "bit_accuracy_by_noise", "bit accuracy by signal ratio")
    path = folder / name
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)
    return path


def _plot_by_noise(axes: Any, rows: list[dict[str, Any]], key: str, title: str) -> None:
    """A line a bin, each point the mean over a fiftieth of the run, so that single steps do not hide the trend."""
    from matplotlib import colormaps

    rows = [row for row in rows if key in row]
    bins = max((len(row[key]) for row in rows), default=0)
    width = max(1, len(rows) // 50)
    for index in range(bins):
        points = []
        for begin in range(0, len(rows), width):
            part = [row for row in rows[begin:begin + width] if row[key][index] is not None]
            if part:
                points.append((part[-1]["step"], sum(row[key][index] for row in part) / len(part)))
        if points:
            axes.plot(*zip(*points), color=colormaps["viridis"](index / max(1, bins - 1)), linewidth=1,
                      label=f"{index / bins:.1f}-{(index + 1) / bins:.1f}")
    axes.set(title=title, xlabel="step")
    if axes.lines:
        axes.legend(fontsize="x-small", ncols=2, title="p", title_fontsize="x-small")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: no JSON object ({error}); mend or remove the line") from error
    return rows


def _json_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """wandb draws single numbers: a list under `key` becomes `key/0`, `key/1`, ..."""
    flat = {}
    for key, value in row.items():
        items = {f"{key}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {key: value}
        flat.update({name: item for name, item in items.items() if item is not None})
    return flat


def _start_wandb(folder: Path, run_id: str, settings: LoggingConfig, config: Mapping[str, Any] | None) -> Any:
    """A wandb run that later attempts continue under the same id.

    Steps are an ordinary metric there: wandb's own step may not go back, as a resumed run's does.
    """
    import wandb

    run = wandb.init(project=settings.project, id=run_id, name=folder.name, dir=str(folder), resume="allow",
                     mode=settings.wandb, config=dict(config or {}))
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run

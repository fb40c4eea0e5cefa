"""How far a job has come, from the files it keeps while it works: plain values, None for what they do not tell."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grn_scale.config.load import read_mapping
from grn_scale.slurm.records import CONFIG, Submission
from grn_scale.slurm.tail import last_bytes
from grn_scale.storage import Storage
from grn_scale.train.metrics import FILE_NAME as METRICS

HEALTH, FLEET = "health.json", "status.json"
"""Of training and of tokenization; the modules that write them load torch."""
RECENT_ROWS = 20
TAIL_BYTES = 1 << 20
"""Enough for the recent rows: one has some kilobytes."""

log = logging.getLogger("grn_scale.slurm")


def progress_of(submission: Submission, now: float) -> dict[str, Any]:
    """What is known of a job's progress; empty for kinds that keep no record of it. now: Unix time.

    Training: step, steps, loss, tokens_per_second, mfu, seconds_left, row_age_seconds (of the last step's record),
    health (state, age_seconds, silent ranks; None where there is none). Tokenization: state, chunks, chunks_in_all,
    bad_lines, clips_per_second, workers, seconds_left, age_seconds.
    """
    if submission.kind == "train":
        run = Path(submission.facts["run"])
        return {**_training(_recent_rows(run / METRICS), _planned_steps(submission), now), "health": _health(run, now)}
    if submission.kind == "tokenize":
        return _tokenization(submission.facts["run"], now)
    return {}


def _training(rows: Sequence[dict[str, Any]], steps: int | None, now: float) -> dict[str, Any]:
    if not rows:
        return {"step": None, "steps": steps, "loss": None, "tokens_per_second": None, "mfu": None,
                "seconds_left": None, "row_age_seconds": None}
    last = rows[-1]
    here = [row for row in rows if row.get("attempt") == last.get("attempt")]
    pace = _seconds_a_step(here)
    return {"step": last["step"], "steps": steps, "loss": last.get("loss"),
            "tokens_per_second": _median(here, "tokens_per_second"), "mfu": _median(here, "mfu"),
            "seconds_left": max(0, steps - last["step"]) * pace if steps is not None and pace is not None else None,
            "row_age_seconds": max(0.0, now - last["time"])}


def _seconds_a_step(rows: Sequence[dict[str, Any]]) -> float | None:
    """Of one attempt; saves and validations in between count."""
    first, last = rows[0], rows[-1]
    if last["step"] > first["step"]:
        return (last["time"] - first["time"]) / (last["step"] - first["step"])
    return _median(rows, "step_seconds")


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def _recent_rows(path: Path) -> list[dict[str, Any]]:
    """The last training steps that were recorded since the run last went back, newest last."""
    rows: list[dict[str, Any]] = []
    try:
        text = last_bytes(path, TAIL_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return rows
    *lines, _unfinished = text.split("\n")
    for line in lines:
        try:
            row = json.loads(line)
            if row.get("event") in ("start", "rollback"):
                rows = [kept for kept in rows if kept["step"] <= row["step"]]
            elif "loss" in row:
                rows.append({**row, "step": int(row["step"]), "time": float(row["time"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: a line is left out, it is no record of a step: %r", path, error)
    return rows[-RECENT_ROWS:]


def _planned_steps(submission: Submission) -> int | None:
    path = submission.folder / CONFIG
    if not path.is_file():
        return None
    train = read_mapping(path, "the resolved configuration").get("train")
    return train.get("steps") if isinstance(train, dict) else None


def _health(run: Path, now: float) -> dict[str, Any] | None:
    try:
        values = json.loads((run / HEALTH).read_bytes())
        return {"state": values["state"], "age_seconds": max(0.0, now - values["time"]), "silent": values["silent"],
                "world_size": values["world_size"]}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is left out, it cannot be read: %r", run / HEALTH, error)
        return None


def _tokenization(run: str, now: float) -> dict[str, Any]:
    names = ("state", "chunks", "chunks_in_all", "bad_lines", "clips_per_second", "workers", "seconds_left")
    storage = Storage.of(run)
    try:
        values = json.loads(storage.read(FLEET))
        return {**{name: values[name] for name in names}, "age_seconds": max(0.0, now - values["written"])}
    except FileNotFoundError:
        log.debug("%s is not there yet", storage / FLEET)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is left out, it cannot be read: %r", storage / FLEET, error)
    return {**dict.fromkeys(names), "age_seconds": None}

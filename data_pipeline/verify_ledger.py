"""`grn-scale verify --ledger`: did each epoch of a run take each draw of its plan once, and so each sample as often as
it should?

The answer takes the ledger, the run's config.yaml beside it, and the indexes of its datasets; no shard is read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grn_scale.config.data_schema import DataConfig
from grn_scale.config.load import build, read_mapping
from grn_scale.data.ledger import Ledger
from grn_scale.data.ledger_check import check_epoch
from grn_scale.data.mixture import Mixture
from grn_scale.data.plan import Plan
from grn_scale.errors import EXIT_FAILED, UserError

FIRST = {"missing": "first_missing", "repeated": "first_repeated", "foreign": "first_foreign"}
"""Kinds of draws that are not as they should be -> the field that names the first of each."""


def check_ledger(path: Path, folder: str = "") -> list[dict[str, Any]]:
    """For each epoch of a training run's ledger what it took of the training samples, as plain values.

    folder: where the dataset lies now, for a run on one dataset. The newest epoch may be unfinished: it must be whole
    up to the window that it has come to. Raises UserError or ConfigError where the ledger, the run's config.yaml
    beside it, or an index cannot be read, and where the ledger has no steps, or none of an epoch between others.
    """
    data, seed = _settings(path.with_name("config.yaml"))
    if folder and not data.mixture:
        data = replace(data, dataset=folder)
    ledger = Ledger(path)
    plans: dict[str, Plan] = {}
    found = []
    for epoch in _epochs(ledger):
        snapshot = _snapshot_of(ledger, epoch)
        if snapshot not in plans:
            plans[snapshot] = Plan.of(Mixture.open(data, snapshot, check_files=False), data, seed)
        plan = plans[snapshot]
        report = check_epoch(ledger, plan, epoch, functools.partial(_tracked, f"checking epoch {epoch}"))
        found.append({
            "epoch": epoch, "snapshot": snapshot, "steps": report.steps, "visits": sum(report.visits),
            "finished": report.finished, "missing": report.missing, "repeated": report.repeated,
            "foreign": report.foreign, "exact": report.exact,
            **{name: [asdict(draw) for draw in getattr(report, name)] for name in FIRST.values()},
            "datasets": [{"dataset": part.dataset, "visits_of_an_image": visits.images,
                          "visits_of_a_video": visits.videos, "visits": count}
                         for part, visits, count in zip(data.parts, plan.visits, report.visits)]})
    return found


def show_ledger(path: Path, as_json: bool) -> int:
    """Exit code of a look at the ledger alone, at the datasets that its run read; prints what is found."""
    epochs = check_ledger(path)
    print(json.dumps({"epochs": epochs}, indent=1) if as_json else "\n".join(ledger_lines(epochs)))
    return 0 if all(epoch["exact"] for epoch in epochs) else EXIT_FAILED


def ledger_lines(epochs: list[dict[str, Any]]) -> Iterator[str]:
    """What `check_ledger` found, for people."""
    for epoch in epochs:
        once = all(part["visits_of_an_image"] == part["visits_of_a_video"] == 1 for part in epoch["datasets"])
        right = "each sample once" if once else "each sample as often as the mixture says"
        right = right if epoch["finished"] else "no draw left out or taken twice so far"
        state = "finished" if epoch["finished"] else "under way"
        yield (f"epoch {epoch['epoch']} ({state}, {epoch['steps']} steps): {right if epoch['exact'] else 'WRONG'}; of "
               f"{epoch['visits']} draws of training samples, {epoch['missing']} are missing, {epoch['repeated']} were "
               f"taken again and {epoch['foreign']} are not of the plan")
        for kind, name in FIRST.items():
            for draw in epoch[name]:
                where = "" if draw["step"] is None else f" in step {draw['step']}"
                yield f"  {kind}: draw {draw['draw']}, sample {draw['key']} of dataset {draw['dataset']}{where}"
            if epoch[kind] > len(epoch[name]):
                yield f"  {kind}: and {epoch[kind] - len(epoch[name])} more"
        if epoch["foreign"]:
            yield ("  the plan is the one of config.yaml beside the ledger: if seed, data.window_shards or another "
                   "setting of data was changed between epochs, check this one beside a config.yaml that has the old "
                   "values")


def _settings(path: Path) -> tuple[DataConfig, int]:
    values = read_mapping(path, "--ledger")
    if not isinstance(values.get("data"), dict) or not isinstance(values.get("seed"), int):
        raise UserError(f"{path} does not say the data section and the seed of the run: give a ledger that lies beside "
                        "its run's config.yaml")
    return build(DataConfig, values["data"], "data."), values["seed"]


def _epochs(ledger: Ledger) -> list[int]:
    """From the first to the newest. UserError where there is none, or one between them has no steps."""
    epochs = ledger.epochs
    if not epochs:
        raise UserError(f"the ledger {ledger.path} has no steps, and so proves nothing: give the file that a training "
                        "run with data.ledger=true wrote")
    missing = sorted({*range(epochs[0], epochs[-1])} - {*epochs})
    if missing:
        which = " and ".join(map(str, missing))
        raise UserError(f"the ledger {ledger.path} has no step of {'epoch' if len(missing) == 1 else 'the epochs'} "
                        f"{which}, but steps of epoch {epochs[0]} and of epoch {epochs[-1]}: a run takes each epoch in "
                        "turn, so lines are lost; give the whole file")
    return epochs


def _snapshot_of(ledger: Ledger, epoch: int) -> str:
    snapshots = ledger.snapshots(epoch)
    if len(snapshots) > 1:
        raise UserError(f"the ledger has steps of epoch {epoch} on the snapshots {' and '.join(snapshots)}, but an "
                        "epoch keeps the one it began with: it is not of one run")
    return snapshots[0]


def _tracked(what: str, steps: list) -> Iterable:
    from rich.console import Console
    from rich.progress import track

    return track(steps, what, console=Console(stderr=True), transient=True)

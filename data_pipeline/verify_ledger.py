"""`grn-scale verify --ledger`: did each epoch of a run take each sample as often as it should?

The answer takes the ledger, the run's config.yaml beside it, and the indexes of its datasets; no shard is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from grn_scale.config.data_schema import DataConfig
from grn_scale.config.load import build, read_mapping
from grn_scale.data.ledger import LedgerStep, Sample, check_epoch, read_steps
from grn_scale.data.mixture import Mixture
from grn_scale.data.plan import Plan
from grn_scale.errors import EXIT_FAILED, UserError


def check_ledger(path: Path, folder: str = "") -> list[dict[str, Any]]:
    """For each epoch of a training run's ledger what it took of the training samples, as plain values.

    folder: where the dataset lies now, for a run on one dataset. The newest epoch may be unfinished: what it lacks is
    not missing yet. Raises UserError or ConfigError where the ledger, the run's config.yaml beside it, or an index
    cannot be read.
    """
    data, seed = _settings(path.with_name("config.yaml"))
    if folder and not data.mixture:
        data = replace(data, dataset=folder)
    steps = read_steps(path)
    plans: dict[str, Plan] = {}
    epochs = sorted({step.epoch for step in steps.values()})
    found = []
    for epoch in epochs:
        snapshot = _snapshot_of(steps, epoch)
        if snapshot not in plans:
            plans[snapshot] = Plan.of(Mixture.open(data, snapshot, check_files=False), data, seed)
        plan = plans[snapshot]
        expected = _expected(plan, epoch)
        report = check_epoch(steps, epoch, expected)
        finished = epoch != epochs[-1] or not report.missing
        found.append({
            "epoch": epoch, "snapshot": snapshot, "steps": report.steps, "visits": report.expected,
            "finished": finished, "missing": len(report.missing), "repeated": len(report.repeated),
            "exact": report.exact if finished else not report.repeated,
            "datasets": [{"dataset": part.dataset, "visits_of_an_image": visits.images,
                          "visits_of_a_video": visits.videos,
                          "visits": sum(count for (number, _), count in expected.items() if number == dataset)}
                         for dataset, (part, visits) in enumerate(zip(data.parts, plan.visits))]})
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
        right = right if epoch["finished"] else "no sample too often"
        state = "finished" if epoch["finished"] else "under way"
        yield (f"epoch {epoch['epoch']} ({state}, {epoch['steps']} steps): {right if epoch['exact'] else 'WRONG'}; of "
               f"{epoch['visits']} visits to training samples, {epoch['missing']} samples lack some and "
               f"{epoch['repeated']} had too many")


def _settings(path: Path) -> tuple[DataConfig, int]:
    values = read_mapping(path, "--ledger")
    if not isinstance(values.get("data"), dict) or not isinstance(values.get("seed"), int):
        raise UserError(f"{path} does not say the data section and the seed of the run: give a ledger that lies beside "
                        "its run's config.yaml")
    return build(DataConfig, values["data"], "data."), values["seed"]


def _snapshot_of(steps: dict[int, LedgerStep], epoch: int) -> str:
    snapshots = sorted({step.snapshot for step in steps.values() if step.epoch == epoch})
    if len(snapshots) > 1:
        raise UserError(f"the ledger has steps of epoch {epoch} on the snapshots {' and '.join(snapshots)}, but an "
                        "epoch keeps the one it began with: it is not of one run")
    return snapshots[0]


def _expected(plan: Plan, epoch: int) -> dict[Sample, int]:
    return {(dataset, key.decode()): count for dataset, keys, counts in plan.visits_by_shard(epoch)
            for key, count in zip(keys[counts > 0].tolist(), counts[counts > 0].tolist())}

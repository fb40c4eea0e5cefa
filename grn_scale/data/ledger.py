"""A record of which samples each step took, and the proof from it that an epoch saw each as often as it should."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.atomic import append_line
from grn_scale.batch import Pack
from grn_scale.errors import UserError

LEDGER = "ledger.jsonl"
"""Its name in a run folder."""

Sample = tuple[int, str]
"""Dataset of the mixture, and key."""


@dataclass(frozen=True)
class LedgerStep:
    """What one step took."""

    snapshot: str
    """State of the datasets (`Mixture.snapshot`)."""
    epoch: int
    draws: tuple[tuple[int, str, int], ...]
    """Draw index, sample key and dataset of each."""


@dataclass(frozen=True)
class EpochReport:
    """What a ledger says of one epoch."""

    epoch: int
    steps: int
    expected: int
    """Visits."""
    missing: tuple[Sample, ...]
    """Samples taken less often than expected."""
    repeated: tuple[Sample, ...]
    """Samples taken more often than expected (foreign ones included)."""

    @property
    def exact(self) -> bool:
        return not self.missing and not self.repeated


def record_step(path: str | Path, step: int, packs: Sequence[Pack], snapshot: str) -> None:
    """Append one line for a step: its number, the datasets' snapshot, the epoch, and of each draw its index, the
    sample's key and its dataset.

    One process writes for all ranks, since each knows all packs. After a restart the steps since the checkpoint are
    written again; `read_steps` lets the last word count.
    """
    line = {"step": step, "snapshot": snapshot, "epoch": packs[0].epoch,
            "draws": [[draw.index, draw.key, draw.dataset] for p in packs for draw in p.draws]}
    append_line(path, json.dumps(line, separators=(",", ":")))


def read_steps(path: str | Path) -> dict[int, LedgerStep]:
    """What each step took, as the run that survived took it.

    A line for a step withdraws all earlier lines from that step on: they belong to an attempt that was cut off after
    its last checkpoint, and a resumed run may count its steps differently. Raises UserError for a line that is no
    ledger line.
    """
    steps: dict[int, LedgerStep] = {}
    last = -1
    try:
        with open(path, encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                step, taken = _parse(text, f"{path}:{number}")
                for withdrawn in range(step, last + 1):
                    steps.pop(withdrawn, None)
                steps[step] = taken
                last = step
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the ledger {path}: {error}") from error
    return steps


def check_epoch(steps: Mapping[int, LedgerStep], epoch: int, expected: Mapping[Sample, int]) -> EpochReport:
    """Whether the steps of a ledger (`read_steps`) took each sample as often in the epoch as `expected` says, and
    nothing else."""
    taken: Counter[Sample] = Counter()
    of_epoch = [step for step in steps.values() if step.epoch == epoch]
    for step in of_epoch:
        taken.update((dataset, key) for _, key, dataset in step.draws)
    wanted = Counter(expected)
    return EpochReport(epoch, len(of_epoch), wanted.total(), tuple(sorted(wanted - taken)),
                       tuple(sorted(taken - wanted)))


def _parse(text: str, where: str) -> tuple[int, LedgerStep]:
    try:
        line: dict[str, Any] = json.loads(text)
        draws = tuple((int(index), str(key), int(dataset)) for index, key, dataset in line["draws"])
        return int(line["step"]), LedgerStep(str(line["snapshot"]), int(line["epoch"]), draws)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not a line of a ledger ({error}); give the file that training wrote, or cut the "
                        "line out") from error

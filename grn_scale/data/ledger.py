"""A record of which samples each step took, and the proof from it that an epoch saw each sample once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.atomic import append_line
from grn_scale.batch import Pack
from grn_scale.errors import UserError

LEDGER = "ledger.jsonl"
"""Its name in a run folder."""


@dataclass(frozen=True)
class EpochReport:
    """What a ledger says of one epoch."""

    epoch: int
    steps: int
    samples: int
    """Samples expected."""
    missing: tuple[str, ...]
    """Keys taken less often than expected."""
    repeated: tuple[str, ...]
    """Keys taken more often than expected (foreign ones included)."""

    @property
    def exact(self) -> bool:
        return not self.missing and not self.repeated


def record_step(path: str | Path, step: int, packs: Sequence[Pack]) -> None:
    """Append one line for a step: its number and, by pack, epoch, position and [draw index, sample key] of its draws.

    One process writes for all ranks, since each knows all packs. After a restart the steps since the checkpoint are
    written again; `read_steps` lets the last word count.
    """
    line = {"step": step,
            "packs": [{"epoch": p.epoch, "position": p.position,
                       "draws": [[draw.index, draw.key] for draw in p.draws]} for p in packs]}
    append_line(path, json.dumps(line, separators=(",", ":")))


def read_steps(path: str | Path) -> dict[int, list[dict[str, Any]]]:
    """Packs by step, as the run that survived took them.

    A line for a step withdraws all earlier lines from that step on: they belong to an attempt that was cut off after
    its last checkpoint, and a resumed run may count its steps differently. Raises UserError for a line that is no
    ledger line.
    """
    steps: dict[int, list[dict[str, Any]]] = {}
    last = -1
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the ledger {path}: {error}") from error
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            step, packs = int(line["step"]), line["packs"]
            for p in packs:
                _ = p["epoch"], p["position"], [(int(index), str(key)) for index, key in p["draws"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}:{number}: not a line of a ledger ({error}); give the file that training "
                            "wrote, or cut the line out") from error
        for withdrawn in range(step, last + 1):
            steps.pop(withdrawn, None)
        steps[step] = packs
        last = step
    return steps


def check_epoch(steps: Mapping[int, Sequence[Mapping[str, Any]]], epoch: int, keys: Iterable[str]) -> EpochReport:
    """Whether the steps of a ledger (`read_steps`) took each of `keys` exactly once in the epoch, and nothing else."""
    expected = Counter(keys)
    taken: Counter[str] = Counter()
    used = 0
    for packs in steps.values():
        of_epoch = [p for p in packs if p["epoch"] == epoch]
        used += bool(of_epoch)
        taken.update(key for p in of_epoch for _, key in p["draws"])
    return EpochReport(epoch, used, expected.total(), tuple(sorted(expected - taken)), tuple(sorted(taken - expected)))

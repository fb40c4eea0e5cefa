"""A record of which samples each step took: a JSON line a step, read in pieces whatever its size."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grn_scale.atomic import append_line
from grn_scale.batch import Pack
from grn_scale.data.columns import KEY_DTYPE
from grn_scale.errors import UserError

LEDGER = "ledger.jsonl"
"""Its name in a run folder."""
BATCH = 1 << 16
"""About how many draws are read at a time."""
_HEAD = re.compile(rb'\{"step":(\d{1,18}),"snapshot":"([^"\\]*)","epoch":(\d{1,18}),"draws":')


@dataclass(frozen=True, eq=False)
class LedgerDraws:
    """n draws of a ledger."""

    step: np.ndarray
    """int64 [n]: which step took each."""
    index: np.ndarray
    """int64 [n]: draw index."""
    keys: np.ndarray
    """S32 [n]: of the samples."""
    dataset: np.ndarray
    """int64 [n]: number in the mixture."""

    def __len__(self) -> int:
        return len(self.index)


def record_step(path: str | Path, step: int, packs: Sequence[Pack], snapshot: str) -> None:
    """Append one line for a step: its number, the datasets' snapshot, the epoch, and of each draw its index, the
    sample's key and its dataset.

    One process writes for all ranks, since each knows all packs. After a restart the steps since the checkpoint are
    written again; `Ledger` lets the last word count.
    """
    line = {"step": step, "snapshot": snapshot, "epoch": packs[0].epoch,
            "draws": [[draw.index, draw.key, draw.dataset] for p in packs for draw in p.draws]}
    append_line(path, json.dumps(line, separators=(",", ":")))


class Ledger:
    """The steps that a ledger tells of, as the run that survived took them. In memory are 32 bytes a step.

    A line for a step withdraws all earlier lines from that step on: they belong to an attempt that was cut off after
    its last checkpoint, and a resumed run may count its steps differently.
    """

    def __init__(self, path: str | Path):
        """Look at the head of every line. UserError where the file cannot be read or a line is none of a ledger."""
        self.path = Path(path)
        steps, numbers, offsets, states = (array("q") for _ in range(4))
        known: dict[tuple[int, str], int] = {}
        try:
            with open(path, "rb") as lines:
                offset = 0
                for number, line in enumerate(lines, 1):
                    head = _HEAD.match(line)
                    if head is None:
                        raise self._refused(number, "it does not begin as one")
                    step = int(head[1])
                    while steps and steps[-1] >= step:
                        for column in (steps, numbers, offsets, states):
                            column.pop()
                    state = (int(head[3]), head[2].decode())
                    for column, value in ((steps, step), (numbers, number), (offsets, offset),
                                          (states, known.setdefault(state, len(known)))):
                        column.append(value)
                    offset += len(line)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the ledger {path}: {error}") from error
        self._states = list(known)  # (epoch, snapshot)
        self._state, self._offset, self._number = (np.array(column, np.int64) for column in (states, offsets, numbers))

    @property
    def epochs(self) -> list[int]:
        """Ascending."""
        return sorted({epoch for epoch, _ in self._used()})

    def snapshots(self, epoch: int) -> list[str]:
        """States of the datasets (`Mixture.snapshot`) that the epoch's steps name, sorted: one, if all is well."""
        return sorted(snapshot for of, snapshot in self._used() if of == epoch)

    def steps(self, epoch: int) -> int:
        """How many steps of the epoch count."""
        return int(self._of(epoch).sum())

    def draws(self, epoch: int, track: Callable[[list], Iterable] = iter) -> Iterator[LedgerDraws]:
        """What the epoch's steps took, about BATCH draws at a time, in the order of the steps.

        track: shows how the walk over the steps comes along. UserError for a line that is none of a ledger.
        """
        chosen = self._of(epoch)
        lines = list(zip(self._offset[chosen].tolist(), self._number[chosen].tolist()))
        found: list[LedgerDraws] = []
        with open(self.path, "rb") as file:
            for offset, number in track(lines):
                file.seek(offset)
                found.append(self._parse(file.readline(), number))
                if sum(map(len, found)) >= BATCH:
                    yield _joined(found)
                    found = []
        if found:
            yield _joined(found)

    def _used(self) -> list[tuple[int, str]]:
        """(epoch, snapshot) of the steps that count, each once."""
        return [self._states[number] for number in np.unique(self._state).tolist()]

    def _of(self, epoch: int) -> np.ndarray:
        """bool [steps that count]: those of the epoch."""
        return np.isin(self._state, [number for number, (of, _) in enumerate(self._states) if of == epoch])

    def _parse(self, text: bytes, number: int) -> LedgerDraws:
        try:
            line = json.loads(text)
            index, keys, dataset = zip(*line["draws"], strict=True) if line["draws"] else ((), (), ())
            names = np.array(keys, "S")
            if names.itemsize > KEY_DTYPE.itemsize:
                raise ValueError(f"a key has more than {KEY_DTYPE.itemsize} bytes")
            return LedgerDraws(np.full(len(index), line["step"]), np.array(index, np.int64), names.astype(KEY_DTYPE),
                               np.array(dataset, np.int64))
        except (ValueError, TypeError, OverflowError) as error:
            raise self._refused(number, str(error)) from error

    def _refused(self, number: int, reason: str) -> UserError:
        return UserError(f"{self.path}:{number}: not a line of a ledger ({reason}); give the file that training "
                         "wrote, or cut the line out")


def _joined(parts: list[LedgerDraws]) -> LedgerDraws:
    return LedgerDraws(*(np.concatenate([getattr(part, name) for part in parts])
                         for name in ("step", "index", "keys", "dataset")))

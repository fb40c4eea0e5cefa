"""The proof from a ledger that an epoch took each draw of its plan once, and nothing else.

The plan says which draw indices an epoch has, and of each the sample. Steps take the windows of a plan in order, so a
window is planned when its first draw is met, and none is kept: what stays in memory is a byte for each place of the
epoch, set once its draw was taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from grn_scale.data.ledger import Ledger, LedgerDraws
from grn_scale.data.plan import Plan
from grn_scale.data.window import TakenSamples

SHOWN = 10
"""Draws of each kind that a report names."""


@dataclass(frozen=True)
class LedgerDraw:
    """A draw that a report names."""

    draw: int
    """Its index."""
    dataset: int
    """Number in the mixture."""
    key: str
    step: int | None = None
    """Which step took it; None for one that none took."""


@dataclass(frozen=True)
class EpochReport:
    """What a ledger says of one epoch. Of the draws that are not as they should be the first SHOWN are named."""

    epoch: int
    steps: int
    visits: tuple[int, ...]
    """For each dataset the draws that the plan has, of an unfinished epoch up to the window it has come to."""
    finished: bool
    missing: int
    """Draws that no step took. Of an unfinished epoch those in the window that it has come to may still follow."""
    repeated: int
    """Takes of a draw that was taken before."""
    foreign: int
    """Takes that the plan does not have: another draw index, or another sample than the index stands for."""
    first_missing: tuple[LedgerDraw, ...]
    first_repeated: tuple[LedgerDraw, ...]
    first_foreign: tuple[LedgerDraw, ...]

    @property
    def exact(self) -> bool:
        """Each draw was taken once, so far."""
        return not self.missing and not self.repeated and not self.foreign


def check_epoch(ledger: Ledger, plan: Plan, epoch: int, track: Callable[[list], Iterable] = iter) -> EpochReport:
    """Whether the steps of a ledger took each draw of the plan's epoch once, with the sample the plan has for it.

    The newest epoch of the ledger may be unfinished; any other must be whole. track: shows how the walk over
    the epoch's steps comes along. Raises UserError for a line that is none of a ledger, and for an index that cannot be
    read.
    """
    check = _Check(plan, epoch)
    for draws in ledger.draws(epoch, track):
        check.take(draws)
    return check.report(ledger.steps(epoch), newest=epoch == ledger.epochs[-1])


class _Check:
    def __init__(self, plan: Plan, epoch: int):
        self._plan, self._epoch = plan, epoch
        self._window = functools.lru_cache(maxsize=2)(functools.partial(plan.taken_samples, epoch))
        self._borders = plan.window_borders(epoch)
        self._taken = np.zeros(int(self._borders[-1] - self._borders[0]), bool)
        self._planned = np.full((plan.windows, len(plan.visits)), -1)  # draws of each dataset; -1: not planned yet
        self._right = np.zeros(plan.windows, np.int64)  # draws that were taken
        self._bad: dict[str, int] = {"repeated": 0, "foreign": 0}
        self._named: dict[str, list[LedgerDraw]] = {"repeated": [], "foreign": []}

    def take(self, draws: LedgerDraws) -> None:
        window = np.searchsorted(self._borders, draws.index, side="right") - 1
        right = np.zeros(len(draws), bool)
        for number in np.unique(window[(window >= 0) & (window < self._plan.windows)]).tolist():
            here = np.flatnonzero(window == number)
            right[here] = self._as_planned(number, draws, here)
        self._note("foreign", draws, np.flatnonzero(~right))
        rows = np.flatnonzero(right)
        places = draws.index[rows] - self._borders[0]
        different, first = np.unique(places, return_index=True)
        new = np.zeros(len(rows), bool)
        new[first] = ~self._taken[different]
        self._taken[different] = True
        self._right += np.bincount(window[rows[new]], minlength=self._plan.windows)
        self._note("repeated", draws, rows[~new])

    def report(self, steps: int, newest: bool) -> EpochReport:
        """newest: draws of the last window that was met, and of those behind it, need not be there yet."""
        windows = self._plan.windows
        met = np.flatnonzero(self._right)
        come = (int(met[-1]) if len(met) else 0) if newest else windows
        for number in range(min(come + 1, windows)):
            if self._planned[number, 0] < 0:
                self._plan_window(number)
        lacking = self._planned.sum(axis=1) - self._right
        finished = not newest or (come == windows - 1 and not lacking[come].item())
        lacking[come:] = 0
        return EpochReport(
            self._epoch, steps, tuple(self._planned[:come + 1].sum(axis=0).tolist()), finished,
            int(lacking.sum()), self._bad["repeated"], self._bad["foreign"], tuple(self._first_missing(lacking)),
            tuple(self._named["repeated"]), tuple(self._named["foreign"]))

    def _plan_window(self, number: int) -> TakenSamples:
        window = self._window(number)
        self._planned[number] = np.bincount(window.dataset, minlength=len(self._plan.visits))
        return window

    def _as_planned(self, number: int, draws: LedgerDraws, rows: np.ndarray) -> np.ndarray:
        """bool: whether the plan has these draws, which lie in the window, with these samples."""
        window = self._plan_window(number)
        if not len(window.index):
            return np.zeros(len(rows), bool)
        at = np.minimum(np.searchsorted(window.index, draws.index[rows]), len(window.index) - 1)
        return ((window.index[at] == draws.index[rows]) & (window.keys[at] == draws.keys[rows])
                & (window.dataset[at] == draws.dataset[rows]))

    def _note(self, kind: str, draws: LedgerDraws, rows: np.ndarray) -> None:
        self._bad[kind] += len(rows)
        for i in rows[:SHOWN - len(self._named[kind])].tolist():
            self._named[kind].append(LedgerDraw(int(draws.index[i]), int(draws.dataset[i]),
                                                draws.keys[i].decode(errors="replace"), int(draws.step[i])))

    def _first_missing(self, lacking: np.ndarray) -> list[LedgerDraw]:
        found: list[LedgerDraw] = []
        for number in np.flatnonzero(lacking).tolist():
            window = self._plan_window(number)
            for i in np.flatnonzero(~self._taken[window.index - self._borders[0]])[:SHOWN - len(found)].tolist():
                found.append(LedgerDraw(int(window.index[i]), int(window.dataset[i]), window.keys[i].decode()))
            if len(found) == SHOWN:
                break
        return found

"""Which process is slower than the others: their own times, compared every few steps."""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grn_scale.config.run_schema import WatchdogConfig

REPEATS = 3
"""Comparisons in a row in which a process must be slow until it is named: once may be an unlucky batch."""


@dataclass(frozen=True)
class RankTimes:
    """Mean seconds a step of one process."""

    host: str
    forward_backward: float
    data_wait: float


class Stragglers:
    """Compares the processes every `settings.straggler_every` steps.

    gather: value of this process -> values of all processes in rank order; every process takes part. warn: is told who
    is slow.
    """

    def __init__(self, settings: WatchdogConfig, gather: Callable[[object], list], warn: Callable[[str], None]) -> None:
        self._settings, self._gather, self._warn = settings, gather, warn
        self._steps: list[tuple[float, float]] = []
        self._slow: dict[tuple[int, str], int] = {}

    def add(self, forward_backward: float, data_wait: float) -> dict[str, float | int | str]:
        """Take in this process's seconds of a step. The comparison as fields of a row of metrics, after every so many
        steps; empty otherwise."""
        self._steps.append((forward_backward, data_wait))
        if not self._settings.straggler_every or len(self._steps) % self._settings.straggler_every:
            return {}
        mine = RankTimes(socket.gethostname(), *(statistics.fmean(column) for column in zip(*self._steps)))
        self._steps.clear()
        ranks = self._gather(mine)
        self._name_slow(ranks)
        return summary(ranks)

    def _name_slow(self, ranks: Sequence[RankTimes]) -> None:
        slow = {(rank, kind): times for kind in ("forward_backward", "data_wait")
                for rank, times in slow_ranks(ranks, kind, self._settings.straggler_ratio).items()}
        self._slow = {key: self._slow.get(key, 0) + 1 for key in slow}
        for rank, kind in slow:
            if self._slow[rank, kind] % REPEATS == 0:
                self._warn(f"rank {rank} on {ranks[rank].host} is slow: {kind.replace('_', ' ')} takes "
                           f"{slow[rank, kind]:.1f} times the median of all ranks "
                           f"({getattr(ranks[rank], kind):.3f} s a step), in {self._slow[rank, kind]} comparisons in a "
                           "row")


def slow_ranks(ranks: Sequence[RankTimes], kind: str, ratio: float) -> dict[int, float]:
    """Rank -> times the median of `kind` it takes, for ranks above `ratio`. A difference below a hundredth of the
    median step is no delay to anybody."""
    values = [getattr(rank, kind) for rank in ranks]
    median = statistics.median(values)
    step = statistics.median(rank.forward_backward + rank.data_wait for rank in ranks)
    least = max(median, 1e-2 * step)
    return {rank: value / least for rank, value in enumerate(values) if least > 0 and value > ratio * least}


def summary(ranks: Sequence[RankTimes]) -> dict[str, float | int | str]:
    """Least, median and greatest of each time, and who takes longest."""
    row: dict[str, float | int | str] = {}
    for kind in ("forward_backward", "data_wait"):
        values = [getattr(rank, kind) for rank in ranks]
        row |= {f"ranks_{kind}_min": min(values), f"ranks_{kind}_median": statistics.median(values),
                f"ranks_{kind}_max": max(values)}
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].forward_backward + ranks[rank].data_wait)
    return row | {"slowest_rank": slowest, "slowest_host": ranks[slowest].host}

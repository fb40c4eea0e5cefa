"""Which process is slower than the others, as far as times can tell: compared every few steps.

In the middle of forward and backward a process waits for those it shares a copy of the model with (tensor, pipeline and
context parallelism), so a slow one makes them all look slow. Copies do not wait for each other there, unless ZeRO-2 or
3 reduces gradients meanwhile. So forward and backward are compared between whole copies (replicas), and single
processes by what they do alone: waiting for samples, and a probe.
"""

from __future__ import annotations

import socket
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grn_scale.config.run_schema import WatchdogConfig
from grn_scale.train import memory

REPEATS = 3
"""Comparisons in a row in which something must be slow until it is named: once may be an unlucky batch."""
OWN = {"data_wait": "waiting for samples", "probe": "the probe"}
"""Fields of RankTimes that no other process has a part in."""


@dataclass(frozen=True)
class RankTimes:
    """Mean seconds of one process."""

    host: str
    replica: int
    """Number of the copy of the model that it holds a part of."""
    forward_backward: float
    """A step, with the waits for the other processes of the replica."""
    data_wait: float
    """A step, for its samples."""
    probe: float
    """Of the probe (`probe.Probe`)."""


class Stragglers:
    """Compares the processes every `settings.straggler_every` steps.

    replica: which copy of the model this process holds a part of. probe: carries out the probe, and returns its
    seconds. held: the most memory since the last call; it goes along, so that it costs no exchange of its own. gather:
    value of this process -> values of all processes in rank order; every process takes part. warn: is told who is slow.
    """

    def __init__(self, settings: WatchdogConfig, replica: int, probe: Callable[[], float],
                 held: Callable[[], memory.Held], gather: Callable[[object], list],
                 warn: Callable[[str], None]) -> None:
        self._settings, self._replica, self._probe, self._held = settings, replica, probe, held
        self._gather, self._warn = gather, warn
        self._steps: list[tuple[float, float]] = []
        self._slow: dict[tuple[str, int], int] = {}

    def add(self, forward_backward: float, data_wait: float) -> dict[str, float | int | str]:
        """Take in this process's seconds of a step. The comparison as fields of a row of metrics, after every so many
        steps; empty otherwise."""
        self._steps.append((forward_backward, data_wait))
        if not self._settings.straggler_every or len(self._steps) % self._settings.straggler_every:
            return {}
        means = (statistics.fmean(column) for column in zip(*self._steps))
        mine = RankTimes(socket.gethostname(), self._replica, *means, self._probe())
        self._steps.clear()
        ranks, peaks = zip(*self._gather((mine, self._held())))
        self._name_slow(ranks)
        return summary(ranks) | memory.summary(peaks)

    def _name_slow(self, ranks: Sequence[RankTimes]) -> None:
        ratio = self._settings.straggler_ratio
        own = {kind: slow_ranks(ranks, kind, ratio) for kind in OWN}
        replicas = slower(replica_times(ranks), ratio)
        found = {("replica", number) for number in replicas}
        found |= {(kind, rank) for kind, slow in own.items() for rank in slow}
        self._slow = {key: self._slow.get(key, 0) + 1 for key in found}
        for kind, number in sorted(key for key in found if self._slow[key] % REPEATS == 0):
            row = f"in {self._slow[kind, number]} comparisons in a row"
            if kind == "replica":
                self._warn(f"{_replica(ranks, number)} is slow: forward and backward take {replicas[number]:.1f} times "
                           f"those of the median replica ({replica_times(ranks)[number]:.3f} s a step), {row}. Its "
                           f"processes wait for each other there; by itself {_slow_alone(ranks, number, own)}")
            else:
                self._warn(f"rank {number} on {ranks[number].host} is slow by itself: {OWN[kind]} takes "
                           f"{own[kind][number]:.1f} times the median of all ranks "
                           f"({getattr(ranks[number], kind):.3g} s), {row}")


def slower(values: Sequence[float], ratio: float, least: float = 0.0) -> dict[int, float]:
    """Number -> times the median that it takes, for the values above `ratio`. Of two, the lower one is the median.
    Below `least` all count as equal."""
    median = max(statistics.median_low(values), least)
    return {i: value / median for i, value in enumerate(values) if median > 0 and value > ratio * median}


def slow_ranks(ranks: Sequence[RankTimes], kind: str, ratio: float) -> dict[int, float]:
    """Rank -> times the median of `kind` it takes, for ranks above `ratio`. A wait below a hundredth of the median step
    is no delay to anybody."""
    step = statistics.median(rank.forward_backward + rank.data_wait for rank in ranks)
    return slower([getattr(rank, kind) for rank in ranks], ratio, 1e-2 * step if kind == "data_wait" else 0.0)


def replica_times(ranks: Sequence[RankTimes]) -> list[float]:
    """Seconds of forward and backward of each replica: those of its process that takes longest."""
    times = [0.0] * (1 + max(rank.replica for rank in ranks))
    for rank in ranks:
        times[rank.replica] = max(times[rank.replica], rank.forward_backward)
    return times


def summary(ranks: Sequence[RankTimes]) -> dict[str, float | int]:
    """Least, median and greatest of each time, and which replica or rank takes longest."""
    row: dict[str, float | int] = {}
    for name, values in (("replicas_forward_backward", replica_times(ranks)),
                         *((f"ranks_{kind}", [getattr(rank, kind) for rank in ranks]) for kind in OWN)):
        row |= {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values),
                f"{name}_slowest": values.index(max(values))}
    return row


def _replica(ranks: Sequence[RankTimes], number: int) -> str:
    members = [i for i, rank in enumerate(ranks) if rank.replica == number]
    hosts = sorted({ranks[i].host for i in members})
    return (f"replica {number} (rank{'s' if len(members) > 1 else ''} {', '.join(map(str, members))} on "
            f"{', '.join(hosts)})")


def _slow_alone(ranks: Sequence[RankTimes], number: int, own: dict[str, dict[int, float]]) -> str:
    """Which processes of the replica are slow in what they do alone."""
    found = [f"rank {i} on {ranks[i].host} is slow ({OWN[kind]}: {times:.1f} times the median)"
             for kind, slow in own.items() for i, times in slow.items() if ranks[i].replica == number]
    return ", ".join(found) or "none of them is slow: look at its network, and at its clocks under load"

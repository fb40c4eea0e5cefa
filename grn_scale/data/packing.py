"""Packs of at most a token budget, and which rank runs which pack. Pure functions of sizes and costs.

Packing is best-fit decreasing: within 11/9 of the fewest packs in the worst case, above 99 % full on real
mixes of clip lengths. Assignment gives every rank the same number of packs and evens out their cost, because
attention makes two packs of equal tokens differ several-fold in work (USER_NEEDS, point 15).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Cost:
    """Training FLOPs of a sequence of s tokens: linear * s + quadratic * s^2."""

    linear: int
    quadratic: int

    @classmethod
    def of_shape(cls, num_layers: int, hidden_size: int, ffn_hidden_size: int) -> Cost:
        """Forward and backward of a GRN transformer: 6 FLOPs a weight of attention (4 C^2) and SwiGLU (3 C H) a
        token, and 12 C a pair of tokens of one sample."""
        return cls(6 * num_layers * (4 * hidden_size**2 + 3 * hidden_size * ffn_hidden_size),
                   12 * num_layers * hidden_size)

    def of(self, lengths: Iterable[int]) -> int:
        """FLOPs of one pack of samples of these lengths; samples do not see each other."""
        return sum(s * (self.linear + self.quadratic * s) for s in lengths)


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes`, in packs whose sizes sum to at most `budget`: each index once, ascending in its pack.

    Best-fit decreasing: from the largest item on, into the fullest pack that still has room. Ties go by index,
    so the result depends on the arguments alone. Raises ValueError for an item that fits no pack.
    """
    packs: list[list[int]] = []
    # Packs with room as one sorted list of room * 2^32 + number: the best fit is one bisection away.
    rooms: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        if not 0 < size <= budget:
            raise ValueError(f"item {item} has size {size}, but a pack takes sizes from 1 to {budget}")
        at = bisect_left(rooms, size << 32)
        if at == len(rooms):
            number, room = len(packs), budget
            packs.append([])
        else:
            room, number = divmod(rooms.pop(at), 1 << 32)
        packs[number].append(item)
        if room > size:
            insort(rooms, (room - size) << 32 | number)
    for items in packs:
        items.sort()
    return packs


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of `costs` it runs, in micro-batch order; every rank gets the same number.

    Longest first: the rank with the least work so far takes the most expensive pack left, tier after tier of
    `ranks` packs; then packs of the busiest rank are swapped with others while that helps. Each rank runs its
    packs from the most expensive on, so that the packs of one micro-batch cost about the same on all ranks:
    pipelines and ZeRO-3 wait for the slowest. Depends on the arguments alone. Raises ValueError where the number
    of packs does not divide by the ranks.
    """
    if ranks < 1 or len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs do not divide by {ranks} ranks")
    cost = np.asarray(costs, dtype=np.float64)
    slots = np.argsort(-cost, kind="stable").reshape(-1, ranks).T.copy()
    load = np.zeros(ranks)
    for column in slots.T:
        column[np.argsort(load, kind="stable")] = column.copy()
        load += cost[column]
    _swap(slots, cost, load)
    slots.sort(axis=1)
    order = np.argsort(-cost[slots], axis=1, kind="stable")
    return np.take_along_axis(slots, order, axis=1).tolist()


def _swap(slots: np.ndarray, cost: np.ndarray, load: np.ndarray) -> None:
    """Lower the load of the busiest rank, one best swap of two packs at a time (`slots` [ranks, packs] in place)."""
    # Each swap lowers the busiest rank below its load, and about one swap a rank evens them out; the bound only
    # cuts a tail of gains near rounding.
    for _ in range(4 * slots.size):
        busiest = int(load.argmax())
        moved = cost[slots[busiest], None, None] - cost[slots]
        higher = np.maximum(load[busiest] - moved, load[:, None] + moved)
        higher[:, busiest] = np.inf
        mine, other, theirs = np.unravel_index(int(higher.argmin()), higher.shape)
        if not higher[mine, other, theirs] < load[busiest] * (1 - 1e-9):
            return
        load[busiest] -= moved[mine, other, theirs]
        load[other] += moved[mine, other, theirs]
        slots[busiest, mine], slots[other, theirs] = slots[other, theirs], slots[busiest, mine]

"""Packs of at most a token budget, and which rank runs which pack. Pure functions of sizes and costs.

A step waits more than once for its slowest rank: at its end for the rank with the most work, and where pipelines or
ZeRO-3 tie the ranks together for the most expensive pack of every micro-batch. A pack of one long clip costs several
times one of images, so packs of equal tokens are not enough. Micro-batches wait least where
packs that must be expensive stand side by side in one of them, and the others are even and cheap enough to give
those ranks back what they lost. `pack` makes such packs, knowing neither ranks nor steps; `assign` places them.
docs/packing.md has the figures and what was tried.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

HEAD_SHARE = 235
"""Of a thousand packs, those that are made as expensive as they can be: a little below a quarter, so that the packs of
a step, drawn from those of a window, seldom have more of them than the first of four micro-batches holds."""
SMALL_SHARE = 50
"""Of a thousand tokens, those of the smallest items, which are kept back to fill the packs to the brim."""
SPARE_SHARE = 1
"""Tokens for each thousand that the planned packs can hold beyond them: without, the last items open new packs."""
TOLERANCE_PERCENT = 1
"""How much above the mean the work of a rank may be: below it, `assign` evens out the micro-batches instead."""
TOP_PRICES = (4, 2, 1, 0)
"""What one more FLOP of a micro-batch's most expensive pack counts against one less of the busiest rank."""


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


class _Packs:
    """Packs under construction: items, room in tokens, and the sum of squares, which is what their costs differ in
    once they are full, whatever the model."""

    def __init__(self, sizes: list[int], budget: int) -> None:
        self.sizes, self.budget = sizes, budget
        self.items: list[list[int]] = []
        self.room: list[int] = []
        self.squares: list[int] = []

    def open(self) -> int:
        """Number of a new, empty pack."""
        self.items.append([])
        self.room.append(self.budget)
        self.squares.append(0)
        return len(self.items) - 1

    def put(self, item: int, number: int) -> None:
        size = self.sizes[item]
        self.items[number].append(item)
        self.room[number] -= size
        self.squares[number] += size * size

    def finished(self) -> list[list[int]]:
        """Items of each pack that has some, ascending."""
        return [sorted(items) for items in self.items if items]

    def add_fullest(self, items: Iterable[int]) -> None:
        """Best-fit decreasing: each item, largest first, into the fullest pack that still has room."""
        # Room and number as one sorted integer: the best fit is one bisection away.
        rooms = sorted(room << 32 | number for number, room in enumerate(self.room))
        for item in items:
            size = self.sizes[item]
            at = bisect_left(rooms, size << 32)
            number = self.open() if at == len(rooms) else rooms.pop(at) & 0xFFFFFFFF
            self.put(item, number)
            if self.room[number]:
                insort(rooms, self.room[number] << 32 | number)

    def add_heads(self, items: list[int], count: int) -> list[int]:
        """Open `count` packs with the largest of `items` (largest first), each filled up with the largest that fit;
        the items that are left, largest first."""
        left = items[:count - 1:-1] if count else items[::-1]
        sizes = [self.sizes[item] for item in left]
        for item in items[:count]:
            number = self.open()
            self.put(item, number)
            while (at := bisect_right(sizes, self.room[number])) > 0:
                self.put(left.pop(at - 1), number)
                sizes.pop(at - 1)
        return left[::-1]

    def add_towards(self, items: Iterable[int], targets: Sequence[int]) -> None:
        """Open a pack for each target of its sum of squares; each item, largest first, goes to the pack that is
        farthest below its target and has room, or to a new one where none has."""
        waiting = [(-target, self.open()) for target in targets]
        heapq.heapify(waiting)
        short_of_room: list[tuple[int, int, int]] = []
        for item in items:
            size = self.sizes[item]
            while short_of_room and -short_of_room[0][0] >= size:
                heapq.heappush(waiting, heapq.heappop(short_of_room)[1:])
            while waiting and self.room[waiting[0][1]] < size:
                above, number = heapq.heappop(waiting)
                heapq.heappush(short_of_room, (-self.room[number], above, number))
            above, number = heapq.heappop(waiting) if waiting else (0, self.open())
            self.put(item, number)
            heapq.heappush(waiting, (above + size * size, number))


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes`, in packs whose sizes sum to at most `budget`: each index once, ascending in its pack.

    The longest items head a little less than a quarter of the packs, filled up with the longest that fit. All other
    packs aim at sums of squares that mirror these heads at half the deviation, so that each expensive pack finds cheap
    ones to share a rank with. The smallest items fill what room is left. Never more than 0.5 % more packs than
    best-fit decreasing makes: where they would be, its packs are returned. Ties go by index, so the result depends on
    the arguments alone. Raises ValueError for an item that fits no pack.
    """
    fullest = best_fit_decreasing(sizes, budget)
    shaped = _shape(sizes, budget)
    return shaped if 200 * len(shaped) <= 201 * len(fullest) else fullest


def best_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Packs as those of `pack`, each item from the largest on in the fullest pack that still had room: nearly as few
    as there can be, whatever they cost. Raises ValueError for an item that fits no pack."""
    array = np.asarray(sizes, dtype=np.int64)
    wrong = np.flatnonzero((array < 1) | (array > budget))
    if len(wrong):
        raise ValueError(f"item {wrong[0]} has size {array[wrong[0]]}, but a pack takes sizes from 1 to {budget}")
    packs = _Packs(array.tolist(), budget)
    packs.add_fullest(_largest_first(array))
    return packs.finished()


def _largest_first(sizes: np.ndarray) -> list[int]:
    return np.argsort(-sizes, kind="stable").tolist()


def _shape(sizes: Sequence[int], budget: int) -> list[list[int]]:
    array = np.asarray(sizes, dtype=np.int64)
    sizes, order = array.tolist(), _largest_first(array)
    packs = _Packs(sizes, budget)
    total = sum(sizes)
    count = -(-total * (1000 + SPARE_SHARE) // (1000 * budget))
    heads = count * HEAD_SHARE // 1000
    large, tokens = len(order), 0
    while large > heads and (tokens + sizes[order[large - 1]]) * 1000 <= total * SMALL_SHARE:
        large -= 1
        tokens += sizes[order[large]]
    left = packs.add_heads(order[:large], heads)
    packs.add_towards(left, _mirror(packs.squares, sum(size * size for size in sizes), count - heads))
    packs.add_fullest(order[large:])
    return packs.finished()


def _mirror(heads: list[int], total: int, count: int) -> list[int]:
    """Sums of squares that `count` packs beside the heads should have; `total` is that of all packs."""
    if not count:
        return []
    mean = (total - sum(heads)) // count
    if not heads:
        return [mean] * count
    ordered, middle = sorted(heads), sum(heads) // len(heads)
    return [mean - (ordered[number * len(heads) // count] - middle) // 2 for number in range(count)]


def assign(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of `costs` it runs, in micro-batch order; every rank gets the same number.

    The most expensive packs of all make up the first micro-batch, the next ones the second, and so on: no other
    choice makes the slowest ranks of the micro-batches cheaper in sum. Within each, the rank with the least work so
    far takes the most expensive pack. Then packs of the busiest rank are swapped with others until it is at most
    TOLERANCE_PERCENT above the mean or nothing helps, at first only where that makes no micro-batch much slower.
    Depends on the arguments alone. Raises ValueError where the number of packs does not divide by the ranks.
    """
    if ranks < 1 or len(costs) % ranks:
        raise ValueError(f"{len(costs)} packs do not divide by {ranks} ranks")
    if not len(costs):
        return [[] for _ in range(ranks)]
    # As integers of 40 bits, whose sums are exact in any order: the same choice on every machine.
    cost = np.asarray(costs, dtype=np.float64)
    cost = (cost / (cost.max() or 1.0) * 2.0**40).astype(np.int64)
    most = int(cost.sum()) * (100 + TOLERANCE_PERCENT) // (100 * ranks)
    slots, busiest = np.empty(0), None
    for price in TOP_PRICES:
        found, load = _tiers(cost, ranks)
        _swap(found, cost, load, most, price)
        if busiest is None or load.max() < busiest:
            slots, busiest = found, int(load.max())
        if busiest <= most:
            break
    slots.sort(axis=1)
    order = np.argsort(-cost[slots], axis=1, kind="stable")
    return np.take_along_axis(slots, order, axis=1).tolist()


def _tiers(cost: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs [ranks, micro-batches], expensive micro-batches first, and the work of each rank."""
    slots = np.argsort(-cost, kind="stable").reshape(-1, ranks).T.copy()
    load = np.zeros(ranks, np.int64)
    for column in slots.T:
        column[np.argsort(load, kind="stable")] = column.copy()
        load += cost[column]
    return slots, load


def _swap(slots: np.ndarray, cost: np.ndarray, load: np.ndarray, most: int, price: int) -> None:
    """Lower the load of the busiest rank to `most`, one best swap of two packs at a time (`slots`, `load` in place).

    A swap has to gain more than `price` times what it adds to the most expensive pack of a micro-batch.
    """
    placed = cost[slots]
    # About one swap a rank evens them out; the bound only cuts a tail of gains near rounding.
    for _ in range(2 * slots.size):
        busiest = int(load.argmax())
        if load[busiest] <= most:
            return
        mine = placed[busiest, :, None, None]
        moved = mine - placed
        value = np.maximum(np.maximum(load[busiest] - moved, load[:, None] + moved), most)
        value += price * np.maximum(mine - placed.max(axis=0), 0)
        value[:, busiest] = load[busiest]
        place, other, theirs = np.unravel_index(int(value.argmin()), value.shape)
        if value[place, other, theirs] >= load[busiest]:
            return
        load[busiest] -= moved[place, other, theirs]
        load[other] += moved[place, other, theirs]
        slots[busiest, place], slots[other, theirs] = slots[other, theirs], slots[busiest, place]
        placed[[busiest, other]] = cost[slots[[busiest, other]]]

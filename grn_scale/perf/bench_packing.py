"""How full packs are and how evenly the ranks of a large job work: our packing beside first-fit, the reference's
rules and best-fit decreasing, on one list of clip lengths."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grn_scale.errors import UserError

if TYPE_CHECKING:
    from grn_scale.data.packing import Cost

BUDGET = 131072
RANKS, PACKS_PER_RANK = 512, 4
GRN_2B = {"num_layers": 28, "hidden_size": 2304, "ffn_hidden_size": 8192}
SEEDS = range(5)
COLUMNS = ("t", "h", "w", "text_tokens")
DENSE_RATIO = 0.4
"""The reference's v2 drops what is longer than this share of the budget (GRN reference, sections 4 and 5)."""
TOLERANCE = 0.01
"""Of the bound: how much more than the mean a rank may cost."""

Packing = Callable[[np.ndarray, int], list[list[int]]]
"""Sizes and budget to packs of indices; what is in no pack is lost."""
Assignment = Callable[[Sequence[int], int], list[list[int]]]
"""Costs of packs and number of ranks to the packs of each rank, by micro-batch."""


def bench_packing(path: str | None) -> dict[str, Any]:
    """Fill, cost of the busiest rank and lockstep cost of one step, each as mean and worst of the seeds, of every rule.

    path: a CSV file with the columns t, h, w (latent cells) and text_tokens; without one, a made mix. For each seed
    the clips are shuffled into a window, packed, the packs shuffled, and the first RANKS * PACKS_PER_RANK taken (the
    clips are shuffled into further windows where one makes too few). Lockstep: the most expensive pack of each
    micro-batch, added up, over the mean rank. Raises UserError for a file that cannot be read as such.
    """
    from grn_scale.data.packing import Cost, assign, best_fit_decreasing, pack

    lengths = read_lengths(path) if path else made_lengths()
    cost = Cost.of_shape(**GRN_2B)
    rules: list[tuple[str, Packing, str, Assignment]] = [
        ("first-fit", first_fit, "as shuffled", in_order),
        ("reference v1", reference_v1, "as shuffled", in_order),
        ("reference v2", reference_v2, "as shuffled", in_order),
        ("best-fit decreasing", best_fit_decreasing, "as shuffled", in_order),
        ("best-fit decreasing", best_fit_decreasing, "longest first", longest_first),
        ("best-fit decreasing", best_fit_decreasing, "grn_scale", assign),
        ("grn_scale", pack, "as shuffled", in_order),
        ("grn_scale", pack, "longest first", longest_first),
        ("grn_scale", pack, "grn_scale", assign),
    ]
    rows = []
    for packing, make, assignment, place in rules:
        steps = [_step(lengths, make, place, cost, seed) for seed in SEEDS]
        rows.append({"packing": packing, "assignment": assignment,
                     **{name: {"mean": float(np.mean([step[name] for step in steps])),
                               "worst": float((min if name == "fill" else max)(step[name] for step in steps))}
                        for name in steps[0]}})
    return {"clips": len(lengths), "tokens": int(lengths.sum()), "synthetic": not path, "token_budget": BUDGET,
            "ranks": RANKS, "packs_per_rank": PACKS_PER_RANK, "seeds": len(SEEDS), "model": GRN_2B,
            "lockstep_bound": lockstep_bound(lengths, cost), "rules": rows}


def read_lengths(path: str) -> np.ndarray:
    """int64: visual tokens, text tokens and one of each line of a CSV file. Raises UserError for other files."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or ()
            if not set(COLUMNS) <= set(names):
                raise UserError(f"{path} has the columns {', '.join(names)}, but lengths of clips are read from "
                                f"{', '.join(COLUMNS)}")
            rows = [[int(row[name]) for name in COLUMNS] for row in reader]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}, line {reader.line_num}: {', '.join(COLUMNS)} must be whole numbers ({error})"
                        ) from error
    t, h, w, text = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    lengths = t * h * w + text + 1
    wrong = np.flatnonzero((lengths < 1) | (lengths > BUDGET))
    if len(wrong) or not len(lengths):
        at = f"line {wrong[0] + 2} makes {lengths[wrong[0]]} tokens" if len(wrong) else "it has no line"
        raise UserError(f"{path}: {at}, but a pack takes clips of 1 to {BUDGET}")
    return lengths


def made_lengths(count: int = 20000) -> np.ndarray:
    """int64 [count]: a third images, the others clips of 2 to 53 latent frames, most of them short, at 256 to 2304
    cells a frame, whose longest are 120,000 tokens; the same every time."""
    drawn = np.random.default_rng(0)
    frames = np.where(drawn.random(count) < 1 / 3, 1, 2 + (51 * drawn.random(count) ** 2).astype(np.int64))
    cells = drawn.choice([256, 576, 1600, 2304], count)
    return frames * cells + drawn.integers(20, 300, count)


def lockstep_bound(lengths: np.ndarray, cost: Cost) -> float:
    """What no packing and no assignment can go below where every rank costs at most 1 + TOLERANCE of the mean, on a
    step that holds its fair share of all lengths.

    The k-th most expensive pack costs at most what two or more clips no longer than the k-th longest clip can. A rank
    whose costliest pack is c runs the others, B in all micro-batches at most, within its limit. The smallest B that
    lets the ranks do all the work, and the longest clip, which some micro-batch has to hold, are the bound.
    """
    ordered = np.sort(lengths)[::-1].astype(np.float64)
    packs = lengths.sum() / BUDGET
    mean = float(cost.linear * ordered.sum() + cost.quadratic * (ordered**2).sum()) / packs
    longest = ordered[((np.arange(RANKS) + 0.5) / (RANKS * PACKS_PER_RANK) * packs).astype(np.int64)]
    whole = BUDGET // longest
    squares = whole * longest**2 + (BUDGET - whole * longest) ** 2
    first = (cost.linear * BUDGET + cost.quadratic * squares) / mean
    limit = PACKS_PER_RANK * (1 + TOLERANCE)
    low, high = 0.0, limit
    for _ in range(60):
        others = (low + high) / 2
        enough = np.minimum(first + others, limit).sum() >= RANKS * PACKS_PER_RANK
        low, high = (low, others) if enough else (others, high)
    return (cost.of([int(ordered[0])]) / mean + high) / PACKS_PER_RANK


def _step(lengths: np.ndarray, make: Packing, place: Assignment, cost: Cost, seed: int) -> dict[str, float]:
    """What one step of this seed comes to."""
    drawn = np.random.default_rng(seed)
    taken: list[np.ndarray] = []
    seconds, offered = 0.0, 0
    while len(taken) < RANKS * PACKS_PER_RANK:
        window = drawn.permutation(lengths)
        begin = time.process_time()
        packs = make(window, BUDGET)
        seconds = max(seconds, time.process_time() - begin)
        if not packs:
            raise UserError(f"the {len(lengths)} clips make no pack of {BUDGET} tokens under one of the rules: "
                            "give a file with more clips")
        offered += int(window.sum())
        taken += [window[packs[i]] for i in drawn.permutation(len(packs))]
    used = sum(int(sizes.sum()) for sizes in taken)
    step = taken[:RANKS * PACKS_PER_RANK]
    costs = [cost.of(sizes.tolist()) for sizes in step]
    begin = time.process_time()
    by_rank = place(costs, RANKS)
    placing = time.process_time() - begin
    work = np.array([[float(costs[i]) for i in mine] for mine in by_rank])
    mean = work.sum(axis=1).mean()
    return {"fill": sum(int(sizes.sum()) for sizes in step) / (BUDGET * sum(len(sizes) > 0 for sizes in step)),
            "tokens_lost": 1 - used / offered, "busiest_rank": work.sum(axis=1).max() / mean,
            "lockstep": work.max(axis=0).sum() / mean, "pack_seconds": seconds, "assign_seconds": placing}


def first_fit(sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Each item, in the given order, into the first pack that has room."""
    packs: list[list[int]] = []
    room = np.full(len(sizes), budget)
    for item, size in enumerate(sizes.tolist()):
        number = int(np.argmax(room >= size))
        if number == len(packs):
            packs.append([])
        packs[number].append(item)
        room[number] -= size
    return packs


def reference_v1(sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Append until the budget is reached or passed; the item that passes it is lost, and the last pack too."""
    packs: list[list[int]] = []
    items: list[int] = []
    room = budget
    for item, size in enumerate(sizes.tolist()):
        if size <= room:
            items.append(item)
        room -= size
        if room <= 0:
            packs.append(items)
            items, room = [], budget
    return packs


def reference_v2(sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Without the items above DENSE_RATIO of the budget: from the longest on until one does not fit, then from the
    shortest end."""
    order = [item for item in np.argsort(-sizes, kind="stable").tolist() if sizes[item] <= DENSE_RATIO * budget]
    packs: list[list[int]] = []
    first, end = 0, len(order)
    while first < end:
        begin, room = first, budget
        while first < end and sizes[order[first]] <= room:
            room -= sizes[order[first]]
            first += 1
        items = order[begin:first]
        while first < end and sizes[order[end - 1]] <= room:
            end -= 1
            room -= sizes[order[end]]
            items.append(order[end])
        packs.append(items)
    return packs


def in_order(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Packs as they come: random, since they are shuffled."""
    return np.arange(len(costs)).reshape(-1, ranks).T.tolist()


def longest_first(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The rank with the least work takes the most expensive pack left, each rank one before any takes another."""
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    work = [0] * ranks
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    for first in range(0, len(order), ranks):
        for rank, item in zip(sorted(range(ranks), key=work.__getitem__), order[first:first + ranks]):
            by_rank[rank].append(item)
            work[rank] += costs[item]
    return by_rank

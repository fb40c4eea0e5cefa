"""Packs and their assignment to ranks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from grn_scale.data.packing import Cost, assign, pack

GRN_2B = Cost.of_shape(num_layers=28, hidden_size=2304, ffn_hidden_size=8192)


def clip_lengths(count: int, seed: int = 0) -> list[int]:
    """Token counts as video corpora have them: a third images, clips of 1 to 20 s, 256 to 900 cells a frame."""
    rng = random.Random(seed)
    frames, cells = (1, 1, 2, 5, 9, 16, 22, 30, 53), (256, 400, 576, 900, 1600)
    return [rng.choice(frames) * rng.choice(cells) + rng.randrange(20, 300) for _ in range(count)]


def test_every_item_is_packed_once_within_the_budget():
    sizes = clip_lengths(3000)
    packs = pack(sizes, 131072)
    assert sorted(item for items in packs for item in items) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in items) for items in packs) <= 131072


def test_packs_of_a_realistic_mix_are_99_percent_full():
    sizes = clip_lengths(16384)
    assert sum(sizes) / (len(pack(sizes, 131072)) * 131072) > 0.99


def test_packing_finds_the_exact_fit():
    assert sorted(pack([6, 5, 5, 4, 3, 3, 2, 2], 10)) == [[0, 3], [1, 2], [4, 5, 6, 7]]


def test_packing_depends_on_the_order_of_equal_sizes_only_through_their_indices():
    assert pack([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]


def test_item_of_exactly_the_budget_fills_a_pack():
    assert pack([7, 10], 10) == [[1], [0]]


def test_no_items_make_no_packs():
    assert pack([], 10) == []


@pytest.mark.parametrize("size", [11, 0, -1])
def test_item_that_fits_no_pack_is_refused(size):
    with pytest.raises(ValueError, match=f"item 1 has size {size}"):
        pack([3, size], 10)


def test_cost_is_linear_in_tokens_and_quadratic_in_each_sample():
    cost = Cost(linear=10, quadratic=1)
    assert cost.of([3, 4]) == 10 * 7 + 9 + 16
    assert cost.of([]) == 0
    assert (GRN_2B.linear, GRN_2B.quadratic) == (6 * 28 * (4 * 2304**2 + 3 * 2304 * 8192), 12 * 28 * 2304)


def balance(costs: list[int], ranks: int) -> float:
    by_rank = assign(costs, ranks)
    assert sorted(i for mine in by_rank for i in mine) == list(range(len(costs)))
    assert {len(mine) for mine in by_rank} == {len(costs) // ranks}
    loads = [sum(costs[i] for i in mine) for mine in by_rank]
    return max(loads) / np.mean(loads)


def test_ranks_get_equal_counts_and_nearly_equal_cost():
    sizes = clip_lengths(16384)
    costs = [GRN_2B.of(sizes[i] for i in items) for items in pack(sizes, 131072)]
    assert balance(costs[:512], 128) < 1.02
    assert balance(costs[:512], 8) < 1.001


def test_micro_batches_run_from_the_most_expensive_on():
    for mine in assign([5, 1, 9, 7, 2, 8], 2):
        costs = [[5, 1, 9, 7, 2, 8][i] for i in mine]
        assert costs == sorted(costs, reverse=True)


def test_swaps_find_what_longest_first_misses():
    # Longest first alone puts 8 + 5 + 4 against 7 + 6 + 1.
    assert balance([8, 7, 6, 5, 4, 1], 2) == pytest.approx(16 / 15.5)


def test_empty_packs_are_shared_out_too():
    assert balance([4, 4, 0, 0, 0, 0, 0, 0], 2) == 1.0
    assert assign([0, 0], 2) == [[0], [1]]


def test_one_rank_takes_all():
    assert assign([1, 3, 2], 1) == [[1, 2, 0]]


@pytest.mark.parametrize("ranks", [0, 2, 4])
def test_packs_that_do_not_divide_by_the_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="do not divide"):
        assign([1, 2, 3], ranks)

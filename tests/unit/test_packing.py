"""Packs and their assignment to ranks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grn_scale.data.packing import Cost, assign, best_fit_decreasing, pack
from grn_scale.errors import UserError
from grn_scale.perf import bench, bench_packing

GRN_2B = Cost.of_shape(num_layers=28, hidden_size=2304, ffn_hidden_size=8192)
BUDGET = 131072
LENGTHS = bench_packing.made_lengths(8000)


def clips(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).choice(LENGTHS, count).tolist()


def check_packs(packs: list[list[int]], sizes: list[int], budget: int) -> None:
    assert sorted(item for items in packs for item in items) == list(range(len(sizes)))
    assert all(items == sorted(items) and items for items in packs)
    assert max(sum(sizes[i] for i in items) for items in packs) <= budget


@pytest.mark.parametrize("count", [1, 2, 7, 40, 300, 3000])
def test_every_item_is_packed_once_within_the_budget(count):
    sizes = clips(count)
    for rule in (pack, best_fit_decreasing):
        check_packs(rule(sizes, BUDGET), sizes, BUDGET)


@pytest.mark.parametrize("sizes", [
    [300] * 5000, [40_000] * 400, [BUDGET] * 9, [BUDGET // 2 + 1] * 50 + [1] * 50, list(range(1, 700)),
    [BUDGET, 1] * 30, [70_000, 50_000, 11_072] * 40])
def test_packs_are_nearly_as_few_as_best_fit_decreasing_makes(sizes):
    packs = pack(sizes, BUDGET)
    check_packs(packs, sizes, BUDGET)
    assert 200 * len(packs) <= 201 * len(best_fit_decreasing(sizes, BUDGET))


def test_best_fit_decreasing_finds_the_exact_fit():
    assert sorted(best_fit_decreasing([6, 5, 5, 4, 3, 3, 2, 2], 10)) == [[0, 3], [1, 2], [4, 5, 6, 7]]


def test_few_items_fall_back_on_best_fit_decreasing():
    # Towards equal sums of squares 4 would go to the 5 and 3 to the 6, and 2 would need a third pack.
    assert sorted(pack([6, 5, 4, 3, 2], 10)) == [[0, 2], [1, 3, 4]]


def test_equal_sizes_are_taken_by_index():
    assert pack([5, 5, 5, 5], 10) == pack(np.array([5, 5, 5, 5]), 10)
    assert sorted(best_fit_decreasing([5, 5, 5, 5], 10)) == [[0, 1], [2, 3]]


def test_packs_are_the_same_every_time_and_do_not_change_the_sizes():
    sizes = np.array(clips(2000))
    before = sizes.copy()
    assert pack(sizes, BUDGET) == pack(sizes.tolist(), BUDGET)
    assert (sizes == before).all()


def test_item_of_exactly_the_budget_fills_a_pack():
    assert sorted(pack([7, 10], 10)) == [[0], [1]]


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


def work(costs: list[int], ranks: int) -> np.ndarray:
    """Cost [ranks, micro-batches], after checking that each pack is run once and all ranks run equally many."""
    by_rank = assign(costs, ranks)
    assert sorted(i for mine in by_rank for i in mine) == list(range(len(costs)))
    assert {len(mine) for mine in by_rank} == {len(costs) // ranks}
    return np.array([[float(costs[i]) for i in mine] for mine in by_rank])


def balance(costs: list[int], ranks: int) -> float:
    loads = work(costs, ranks).sum(axis=1)
    return loads.max() / loads.mean()


def shuffled_costs(packs: list[list[int]], sizes: np.ndarray) -> list[int]:
    order = np.random.default_rng(1).permutation(len(packs))
    return [GRN_2B.of(sizes[packs[i]].tolist()) for i in order]


def test_packs_are_full_and_ranks_and_micro_batches_even_on_a_mix_of_images_and_clips():
    packs = pack(LENGTHS, BUDGET)
    assert LENGTHS.sum() / (len(packs) * BUDGET) > 0.99
    mine = work(shuffled_costs(packs, LENGTHS)[:640], 160)
    assert mine.sum(axis=1).max() / mine.sum(axis=1).mean() <= 1.01 + 1e-9
    lockstep = mine.max(axis=0).sum() / mine.sum(axis=1).mean()
    other = work(shuffled_costs(best_fit_decreasing(LENGTHS, BUDGET), LENGTHS)[:640], 160)
    assert lockstep < 1.2 < other.max(axis=0).sum() / other.sum(axis=1).mean()


def test_many_packs_a_rank_even_out_nearly_wholly():
    mine = work(shuffled_costs(pack(LENGTHS, BUDGET), LENGTHS)[:640], 20)
    assert mine.max(axis=0).sum() / mine.sum(axis=1).mean() < 1.05


def test_micro_batches_run_from_the_most_expensive_on():
    for mine in assign([5, 1, 9, 7, 2, 8], 2):
        costs = [[5, 1, 9, 7, 2, 8][i] for i in mine]
        assert costs == sorted(costs, reverse=True)


def test_swaps_find_what_longest_first_misses():
    # Longest first alone puts 8 + 5 + 4 against 7 + 6 + 1.
    assert balance([8, 7, 6, 5, 4, 1], 2) == pytest.approx(16 / 15.5)


def test_micro_batches_are_as_cheap_as_can_be_where_the_ranks_are_even_anyway():
    costs = np.random.default_rng(0).integers(1000, 1010, 64).tolist()
    assert work(costs, 16).max(axis=0).tolist() == sorted(costs, reverse=True)[::16]


def test_empty_packs_are_shared_out_too():
    assert balance([4, 4, 0, 0, 0, 0, 0, 0], 2) == 1.0
    assert assign([0, 0], 2) == [[0], [1]]


def test_assignment_does_not_depend_on_the_unit_of_the_costs():
    costs = np.random.default_rng(0).integers(1, 1000, 64).tolist()
    assert assign(costs, 16) == assign([cost * 2.0**40 for cost in costs], 16) == assign([c << 80 for c in costs], 16)


def test_one_rank_takes_all():
    assert assign([1, 3, 2], 1) == [[1, 2, 0]]
    assert assign([], 2) == [[], []]


@pytest.mark.parametrize("ranks", [0, 2, 4])
def test_packs_that_do_not_divide_by_the_ranks_are_refused(ranks):
    with pytest.raises(ValueError, match="do not divide"):
        assign([1, 2, 3], ranks)


def test_benchmark_compares_all_rules_on_a_file_of_lengths(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_packing, "RANKS", 16)
    monkeypatch.setattr(bench_packing, "SEEDS", range(2))
    file = tmp_path / "lengths.csv"
    file.write_text("t,h,w,text_tokens\n" + "".join(f"{1 + i % 20},40,{20 + i % 30},{i}\n" for i in range(400)))
    assert bench.main(["packing", "--json", "--lengths", str(file)]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["clips"] == 400 and results["tokens"] == bench_packing.read_lengths(str(file)).sum()
    rules = {(rule["packing"], rule["assignment"]): rule for rule in results["rules"]}
    assert len(rules) == 9
    ours = rules["grn_scale", "grn_scale"]
    assert ours["fill"]["worst"] > 0.9 and ours["tokens_lost"]["worst"] == 0
    assert ours["busiest_rank"]["worst"] < rules["first-fit", "as shuffled"]["busiest_rank"]["mean"]
    assert rules["reference v1", "as shuffled"]["tokens_lost"]["mean"] > 0.1
    assert all(1 <= rule["busiest_rank"]["mean"] <= rule["lockstep"]["worst"] for rule in rules.values())


def test_reference_rules():
    assert bench_packing.reference_v1(np.array([6, 5, 4, 6, 9]), 10) == [[0], [2, 3]]
    assert bench_packing.reference_v2(np.array([1, 4, 3, 2, 4, 5]), 10) == [[1, 4, 0], [2, 3]]
    assert bench_packing.first_fit(np.array([6, 5, 4, 6, 3]), 10) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize(("text", "words"), [
    ("t,h,w\n1,2,3\n", "has the columns t, h, w, but"),
    ("t,h,w,text_tokens\n1,2,3,4\n1,x,3,4\n", "line 3: t, h, w, text_tokens must be whole numbers"),
    ("t,h,w,text_tokens\n1,2,3\n", "line 2: t, h, w, text_tokens must be whole numbers"),
    ("t,h,w,text_tokens\n100,100,100,4\n", "line 2 makes 1000005 tokens"),
    ("t,h,w,text_tokens\n", "it has no line"),
    ("", "has the columns , but"),
])
def test_file_that_holds_no_lengths_is_refused(tmp_path, text, words):
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        bench_packing.read_lengths(str(file))


def test_missing_file_of_lengths_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        bench_packing.read_lengths(str(tmp_path / "none.csv"))

"""The order of an epoch, its draws and packs, and how a run stops and resumes in it."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from grn_scale.config.data_schema import DataConfig
from grn_scale.data.plan import DRAWS_OF_AN_EPOCH, FIRST_VALIDATION_DRAW, Plan, sample_weights
from grn_scale.data.split import held_out
from grn_scale.data.state import DataState
from grn_scale.data.window import EMPTY_CAPTION
from grn_scale.errors import ConfigError, UserError
from grn_scale.keyed import hash64, key64, uniforms
from tests.helpers.memory_index import EMPTY_TEXT, MemoryIndex, make_index, make_row

SETTINGS = dict(seed=7, token_budget=1024, caption_drop=0.2, i2v_share=0.5, window_shards=2, validation_fraction=0.1)


def make_plan(index=None, **changes) -> Plan:
    return Plan(index or make_index(), **{**SETTINGS, **changes})


def take(plan: Plan, state: DataState, packs_per_step: int, steps: int):
    """Packs that are not fillers, and the state after `steps` steps."""
    packs = []
    for _ in range(steps):
        step, state = plan.next_step(state, packs_per_step)
        assert len(step) == packs_per_step
        packs += [p for p in step if p.draws]
    return packs, state


def epoch_packs(plan: Plan, epoch: int = 0, packs_per_step: int = 1):
    state = replace(plan.start(), epoch=epoch)
    packs = []
    while state.epoch == epoch:
        step, state = plan.next_step(state, packs_per_step)
        packs += [p for p in step if p.draws]
    return packs


def draws_of(packs):
    return [draw for p in packs for draw in p.draws]


def fingerprint(packs) -> str:
    return hashlib.sha256(repr(packs).encode()).hexdigest()


def test_an_epoch_takes_every_training_sample_once_and_no_other():
    index, plan = make_index(), make_plan()
    for epoch in (0, 1):
        keys = [draw.key for draw in draws_of(epoch_packs(plan, epoch))]
        assert sorted(keys) == sorted(key for key in index.keys if not held_out(key, 0.1))
        assert len(keys) == plan.visits_in_epoch(epoch)


def test_packs_hold_the_budget_and_count_their_positions():
    plan = make_plan()
    packs = epoch_packs(plan)
    assert [p.position for p in packs] == list(range(plan.packs_in_epoch(0)))
    assert max(p.tokens for p in packs) <= 1024


@pytest.mark.parametrize("packs_per_step", [1, 2, 3, 8, 1000])
def test_packs_do_not_depend_on_how_many_a_step_takes(packs_per_step):
    plan = make_plan()
    assert epoch_packs(plan, 0, packs_per_step) == epoch_packs(plan)


def test_changing_the_step_size_on_the_way_changes_no_pack():
    plan = make_plan()
    state, packs = plan.start(), []
    for packs_per_step in (1, 4, 2, 8, 3, 7, 1, 1, 3):
        step, state = plan.next_step(state, packs_per_step)
        packs += step
    assert packs == epoch_packs(plan)[:len(packs)]


def test_last_step_of_an_epoch_is_filled_with_empty_packs():
    plan = make_plan()
    count = plan.packs_in_epoch(0)
    step, state = plan.next_step(replace(plan.start(), position=count - 2), 5)
    assert [p.position for p in step] == [count - 2, count - 1, -1, -1, -1]
    assert (state.epoch, state.position) == (1, 0)
    exact, state = plan.next_step(replace(plan.start(), position=count - 2), 2)
    assert len(exact) == 2 and (state.epoch, state.position) == (1, 0)


def test_resume_from_json_at_another_step_size_continues_the_same_stream():
    first, state = take(make_plan(), make_plan().start(), 4, 5)
    state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    rest, end = take(make_plan(), state, 2, 5)
    assert first + rest == epoch_packs(make_plan())[:30]
    assert end == take(make_plan(), make_plan().start(), 1, 30)[1]


def test_resume_across_the_end_of_an_epoch():
    plan = make_plan()
    whole = epoch_packs(plan, 0) + epoch_packs(plan, 1)
    steps = -(-plan.packs_in_epoch(0) // 7)
    packs, state = take(plan, plan.start(), 7, steps + 2)
    assert (state.epoch, state.position) == (1, 14)
    assert packs == whole[:plan.packs_in_epoch(0) + 14]


@pytest.mark.parametrize("step", [0, 3, 40, 60])
def test_state_at_a_step_equals_walking_there(step):
    plan = make_plan()
    assert plan.state_at(step, 3) == take(plan, plan.start(), 3, step)[1]


def test_epochs_and_seeds_have_orders_of_their_own():
    plan = make_plan()
    orders = [[d.key for d in draws_of(epoch_packs(p, epoch))]
              for p, epoch in ((plan, 0), (plan, 1), (make_plan(seed=8), 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize(("key", "counter"), [(0, 0), (1, 2**64 - 1), (key64(7, "task"), 12345), (2**64 - 1, 2**40)])
def test_hashes_of_arrays_are_those_of_exact_integers(key, counter):
    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    expected = mix((mix(counter ^ key) + key * 0x9E3779B97F4A7C15 + 1) % 2**64)
    counters = np.array([counter, 3], np.uint64)
    assert hash64(key, counters)[0] == expected
    assert uniforms(key, counters)[0] == (expected >> 11) / 2**53


def test_hashes_fill_the_unit_interval_evenly_and_keys_have_nothing_in_common():
    numbers = [uniforms(key64("test", purpose), np.arange(100_000)) for purpose in range(2)]
    for u in numbers:
        counts = np.histogram(u, bins=100, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-squared of 99 degrees of freedom: 148.2 at 0.1 %
    assert abs(np.corrcoef(*numbers)[0, 1]) < 0.02


def test_draw_indices_are_unique_over_epochs_and_splits():
    plan, held = make_plan(), make_plan(split="validation")
    draws = draws_of(epoch_packs(plan, 0) + epoch_packs(plan, 1) + epoch_packs(plan, 2) + epoch_packs(held))
    indices = [draw.index for draw in draws]
    assert len(set(indices)) == len(indices)
    assert all(DRAWS_OF_AN_EPOCH <= d.index < 2 * DRAWS_OF_AN_EPOCH for d in draws_of(epoch_packs(plan, 1)))


def test_identical_in_another_process_with_another_hash_seed():
    code = ("from tests.unit.test_plan import *; print(fingerprint(epoch_packs(make_plan(), 0) "
            "+ epoch_packs(make_plan(), 3) + epoch_packs(make_plan(split='validation'))))")
    plan = make_plan()
    here = fingerprint(epoch_packs(plan, 0) + epoch_packs(plan, 3) + epoch_packs(make_plan(split="validation")))
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": root}, timeout=120)
    assert out.stdout.strip() == here


def test_order_of_the_rows_in_a_shard_does_not_matter_to_what_is_drawn_together():
    # The window is shuffled by the samples' keys, so only membership counts.
    index = make_index()
    reordered = MemoryIndex(tuple(tuple(reversed(shard)) for shard in index.shards))
    choices = [[[(d.index, d.key, d.task, d.caption) for d in sorted(p.draws, key=lambda d: d.index)]
                for p in epoch_packs(make_plan(each))] for each in (index, reordered)]
    assert choices[0] == choices[1]


def test_tasks_follow_length_and_share():
    by_key = make_index().rows
    draws = draws_of(epoch_packs(make_plan()))
    assert all((draw.task == "T2I") == (by_key[draw.key].thw[0] == 1) for draw in draws)
    videos = [draw for draw in draws if draw.task != "T2I"]
    assert 0.3 < sum(draw.task == "I2V" for draw in videos) / len(videos) < 0.7
    for share, task in ((0.0, "T2V"), (1.0, "I2V")):
        tasks = {draw.task for draw in draws_of(epoch_packs(make_plan(i2v_share=share)))}
        assert tasks == {"T2I", task}


def test_lengths_are_those_of_the_text_really_drawn():
    by_key = make_index().rows
    dropped = 0
    choices = set()
    for draw in draws_of(epoch_packs(make_plan())):
        if draw.caption == EMPTY_CAPTION:
            dropped += 1
            assert draw.text_tokens == EMPTY_TEXT.tokens
            continue
        choices.add(draw.caption)
        assert draw.text_tokens == by_key[draw.key].captions[draw.caption].texts[draw.task].tokens
    assert 0.1 < dropped / make_plan().visits_in_epoch(0) < 0.3 and choices == {0, 1, 2}


def test_sample_without_captions_is_drawn_with_the_empty_one():
    index = MemoryIndex((tuple(make_row(0, n, (1, 4, 4), ()) for n in range(5)),))
    plan = make_plan(index, validation_fraction=0.0, caption_drop=0.0)
    assert {draw.caption for draw in draws_of(epoch_packs(plan))} == {EMPTY_CAPTION}


def test_validation_draws_never_change_and_are_never_dropped():
    plan = make_plan(split="validation")
    first, later = draws_of(epoch_packs(plan, 0)), draws_of(epoch_packs(plan, 5))
    assert first == later == draws_of(epoch_packs(make_plan(split="validation", caption_drop=0.9)))
    assert all(draw.caption != EMPTY_CAPTION and draw.index >= FIRST_VALIDATION_DRAW for draw in first)
    assert sorted(draw.key for draw in first) == sorted(key for key in make_index().keys if held_out(key, 0.1))


def test_validation_split_is_stable_when_the_dataset_or_the_fraction_grows():
    small, large = make_index(shards=3), make_index(shards=9)
    split = {key for key in large.keys if held_out(key, 0.1)}
    assert {key for key in small.keys if held_out(key, 0.1)} == split & set(small.keys)
    assert split < {key for key in large.keys if held_out(key, 0.3)}


class Counting(MemoryIndex):
    """Notes the shards whose columns are read."""

    @functools.cached_property
    def reads(self) -> list[int]:
        return []

    def columns(self, shard):
        self.reads.append(shard)
        return super().columns(shard)


def test_making_a_plan_looks_at_one_part_and_a_resume_at_one_window():
    index = Counting(make_index(shards=12).shards)
    plan = make_plan(index)
    assert len(index.reads) == 1
    state = plan.state_at(30, 2)
    assert plan.next_step(state, 1) == make_plan(index).next_step(state, 1)
    resumed = make_plan(index)
    index.reads.clear()
    resumed.next_step(state, 1)
    assert len(index.reads) == SETTINGS["window_shards"] and state.window >= 2
    assert plan._window.cache_info().maxsize == 2


def test_a_state_without_its_window_is_found_by_counting():
    plan = make_plan()
    state = plan.state_at(30, 2)
    packs, after = make_plan().next_step(replace(state, window=0, window_first=0), 3)
    assert (packs, after) == plan.next_step(state, 3)


def test_only_parts_that_may_hold_a_sample_beyond_the_budget_are_read():
    index = Counting(make_index(shards=12).shards)
    bounds = [info.longest for info in index.info.video_shards]
    make_plan(index, token_budget=-(-max(bounds) // 128) * 128)
    assert len(index.reads) == 1
    index.reads.clear()
    with pytest.raises(ConfigError, match="tokens with its longest caption"):
        make_plan(index, token_budget=128)
    assert 1 < len(index.reads) < 12


def test_weights_are_powers_of_predicted_tokens_over_the_whole_step():
    plan = make_plan()
    packs, _ = plan.next_step(plan.start(), 6)
    draws = draws_of(packs)
    for gamma in (0.0, 0.5, 1.0):
        weights = sample_weights(packs, gamma)
        total = sum(draw.predicted_tokens**gamma for draw in draws)
        assert weights == pytest.approx({draw.index: draw.predicted_tokens**gamma / total for draw in draws})
        assert sum(weights.values()) == pytest.approx(1)
    i2v = next(draw for draw in draws if draw.task == "I2V")
    t, h, w = i2v.thw
    assert i2v.predicted_tokens == (t - 1) * h * w and i2v.tokens == t * h * w + i2v.text_tokens + 1


def test_settings_come_from_the_data_section():
    data = DataConfig(token_budget=1024, caption_drop=0.2, i2v_share=0.5, window_shards=2, validation_fraction=0.1)
    assert epoch_packs(Plan.of(make_index(), data, seed=7)) == epoch_packs(make_plan())


def test_a_sample_longer_than_the_budget_is_refused_by_name_when_the_plan_is_made():
    index = MemoryIndex((tuple(make_row(0, n, (5 if n == 3 else 1, 8, 16), [10, 50]) for n in range(6)),))
    with pytest.raises(ConfigError, match=r"clip000003 has 691 tokens .* = 512: set data.token_budget to at least 768"):
        make_plan(index, token_budget=512, i2v_share=0.0, validation_fraction=0.0)
    with pytest.raises(ConfigError, match="clip000003 has 692 tokens"):
        make_plan(index, token_budget=512, i2v_share=0.1, validation_fraction=0.0)
    plan = make_plan(index, token_budget=768, validation_fraction=0.0)
    assert len(draws_of(epoch_packs(plan))) == 6


def test_a_summary_that_hides_a_long_sample_is_found_out_before_its_pack_is_made():
    index = make_index(shards=4)
    shards = tuple(replace(shard, longest=100) for shard in index.info.video_shards)
    plan = make_plan(replace(index, settings={"video_shards": shards}), token_budget=384)
    with pytest.raises(UserError, match=r"sample clip\d+ has \d+ tokens, more than data.token_budget = 384, but the "):
        epoch_packs(plan)


def test_a_caption_without_the_task_that_may_be_drawn_is_refused():
    row = make_row(0, 0, (3, 4, 4), [5])
    del row.captions[0].texts["I2V"]
    make_plan(MemoryIndex(((row,),)), i2v_share=0.0, validation_fraction=0.0)
    with pytest.raises(ConfigError, match="clip000000 has no I2V entry"):
        make_plan(MemoryIndex(((row,),)), validation_fraction=0.0)


def test_empty_splits_are_refused():
    with pytest.raises(ConfigError, match="train split has no sample: the dataset holds 0 .* add samples"):
        make_plan(MemoryIndex(((),)))
    with pytest.raises(ConfigError, match="train split has no sample: .*validation_fraction lower"):
        make_plan(make_index(1, 3), validation_fraction=0.9999)
    with pytest.raises(ConfigError, match="validation split has no sample: .*validation_fraction higher"):
        make_plan(make_index(1, 3), validation_fraction=0.0, split="validation")
    with pytest.raises(ConfigError, match="must be train or validation"):
        make_plan(split="test")


def test_a_state_of_another_snapshot_is_refused():
    plan, grown = make_plan(), make_plan(make_index(8, snapshot="grown"))
    with pytest.raises(ConfigError, match="belongs to snapshot memory of the index, but the dataset is at grown"):
        grown.next_step(plan.start(), 1)


def test_changed_settings_are_refused_in_the_middle_of_an_epoch_only():
    state = make_plan().next_step(make_plan().start(), 1)[1]
    with pytest.raises(ConfigError, match=r"middle of epoch 0, .*: seed=8 \(was 7\), window_shards=3 \(was 2\)\."):
        make_plan(seed=8, window_shards=3).next_step(state, 1)
    after = make_plan(seed=8).next_step(replace(state, position=0), 1)[1]
    assert after.settings == make_plan(seed=8).settings


def test_a_position_behind_the_end_of_the_epoch_is_refused():
    plan = make_plan()
    for window in (0, 99):
        with pytest.raises(ConfigError, match="has only"):
            plan.next_step(replace(plan.start(), position=10_000, window=window), 1)


def test_skip_list_is_sorted_merged_and_carried_on():
    plan = make_plan()
    state = plan.start().with_skips(["b", "a"]).with_skips(["a", "c"])
    assert state.skip == ("a", "b", "c")
    assert plan.next_step(state, 2)[1].skip == ("a", "b", "c")
    assert epoch_packs(plan) == [plan.next_step(replace(state, position=p), 1)[0][0] for p in
                                 range(plan.packs_in_epoch(0))]


@pytest.mark.parametrize("change", [{"epoch": "1"}, {"position": -1}, {"skip": None}, {"other": 1},
                                    {"window": -1}, {"window_first": 1}])
def test_a_damaged_state_is_refused(change):
    with pytest.raises(ConfigError, match="cannot be read"):
        DataState.from_dict({**make_plan().start().to_dict(), **change})
    with pytest.raises(ConfigError, match="cannot be read"):
        DataState.from_dict({})

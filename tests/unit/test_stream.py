"""Datasets that grow under a run: an epoch keeps the snapshot it began with, the next one takes the newest."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from grn_scale.config.data_schema import DataConfig, MixturePart
from grn_scale.data.dataset_info import snapshot_name
from grn_scale.data.loader import PackLoader
from grn_scale.data.mixture import Mixture, newest_snapshot
from grn_scale.data.packing import Cost
from grn_scale.data.plan import Plan
from grn_scale.data.split import held_out
from grn_scale.data.stream import open_plan, renewed
from grn_scale.errors import ConfigError
from tests.helpers.token_dataset import write_tokens


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """One growing dataset of two shards."""
    write_tokens(tmp_path / "tokens", range(2))
    return DataConfig(dataset=str(tmp_path / "tokens"), token_budget=128, window_shards=2, validation_fraction=0.2)


def grow(data: DataConfig) -> None:
    write_tokens(data.parts[0].dataset, range(2, 4))


def opened(data: DataConfig, state=None):
    return open_plan(data, 3, state, lambda: newest_snapshot(data))


def loader_of(data: DataConfig, plan: Plan, state, **changes) -> PackLoader:
    return PackLoader(plan, state, **{**dict(
        packs_per_step=2, cost=Cost(1, 1), gamma=0.5,
        renew=lambda plan: renewed(plan, data, 3, lambda: newest_snapshot(data))), **changes})


def keys_of(steps) -> list[str]:
    return sorted(draw.key for step in steps for p in step.packs for draw in p.draws)


def training_keys(data: DataConfig) -> list[str]:
    (dataset,) = Mixture.open(data).datasets
    return sorted(row.key for shard in range(len(dataset.info.video_shards)) for row in dataset.rows(shard)
                  if not held_out(row.key, 0.2))


def test_growth_leaves_the_epoch_under_way_alone_and_joins_at_the_next(data, caplog):
    plan, state = opened(data)
    small = training_keys(data)
    epochs: dict[int, list] = {0: [], 1: [], 2: []}
    with caplog.at_level(logging.INFO, logger="grn_scale"), loader_of(data, plan, state) as steps:
        for number, step in enumerate(steps):
            if number == 1:
                grow(data)
            if step.packs[0].epoch == 2:
                break
            epochs[step.packs[0].epoch].append(step)
    assert keys_of(epochs[0]) == small and keys_of(epochs[1]) == training_keys(data) and len(small) < len(
        training_keys(data))
    assert {step.state_after.snapshot for step in epochs[0]} == {plan.mixture.snapshot}
    assert caplog.text.count("from epoch 1 on: snapshot") == 1 and "with 64 samples" in caplog.text


def test_a_resume_in_the_middle_of_an_epoch_reads_the_old_snapshot_to_its_end(data):
    plan, state = opened(data)
    whole, end = [], state
    while end.epoch == 0:
        packs, end = plan.next_step(end, 2)
        whole += packs
    middle = plan.next_step(state, 2)[1]
    grow(data)
    resumed, state = opened(data, middle)
    assert resumed.mixture.snapshot == middle.snapshot and state == middle
    with loader_of(data, resumed, state) as steps:
        taken = []
        for step in steps:
            taken.append(step)
            if step.state_after.epoch == 1:
                break
        after = next(steps)
    assert [p for step in taken for p in step.packs] == whole[2:]
    assert after.state_after.snapshot == newest_snapshot(data) != middle.snapshot
    # At the epoch's start, the newest is taken at once: what the run that went on has taken.
    again, state = opened(data, taken[-1].state_after)
    assert again.next_step(state, 2)[0] == after.packs


def test_every_rank_and_every_prefetch_sees_growth_at_the_same_step(data):
    plan, state = opened(data)
    steps = -(-plan.packs_in_epoch(0) // 4) + 2
    taken = []
    for prefetch in (0, 3):
        with loader_of(data, *opened(data), packs_per_step=4, prefetch=prefetch) as loader:
            taken.append([next(loader).packs for _ in range(steps)])
    grow(data)
    with loader_of(data, plan, state, packs_per_step=4, dp_size=2, dp_rank=1) as loader:
        grown = [next(loader).packs for _ in range(steps)]
    assert taken[0] == taken[1] and grown[:-2] == taken[0][:-2] and grown[-2:] != taken[0][-2:]


def test_without_growth_nothing_changes_at_an_epoch_boundary(data):
    plan, state = opened(data)
    steps = 2 * -(-plan.packs_in_epoch(0) // 2) + 1
    with loader_of(data, plan, state) as renewing, loader_of(data, plan, state, renew=None) as plain:
        for _ in range(steps):
            a, b = next(renewing), next(plain)
            assert (a.packs, a.state_after) == (b.packs, b.state_after)


def test_the_held_out_samples_stay_held_out_when_the_dataset_grows(data):
    def held(plan):
        return {draw.key for p in plan.first_packs(1000) for draw in p.draws}

    before = held(Plan.of(Mixture.open(data), data, 3, split="validation"))
    grow(data)
    after = held(Plan.of(Mixture.open(data), data, 3, split="validation"))
    assert before < after and not after & set(training_keys(data))


def test_a_snapshot_that_is_gone_is_refused_with_the_remedy(data, tmp_path):
    plan, state = opened(data)
    grow(data)
    (tmp_path / "tokens" / snapshot_name(state.snapshot)).rename(tmp_path / "gone.parquet")
    with pytest.raises(ConfigError, match=f"belongs to snapshot {state.snapshot[:16]} .* start a new run from"):
        opened(data, plan.next_step(state, 1)[1])
    # Between epochs nothing of it is needed.
    assert opened(data, state)[1].snapshot == newest_snapshot(data)


def test_the_mixture_may_change_between_epochs_only(data):
    plan, state = opened(data)
    two = replace(data, dataset="", mixture=(MixturePart(data.dataset, repeats=2), MixturePart(data.dataset)))
    with pytest.raises(ConfigError, match="the data state is of 1 datasets, but the configuration names 2"):
        opened(two, plan.next_step(state, 1)[1])
    changed, state = opened(two, replace(state, epoch=3))
    assert state.epoch == 3 and len(state.snapshot.split(",")) == 2 and changed.next_step(state, 1)[0][0].draws


def test_a_plan_takes_over_a_state_between_epochs_only(data):
    plan, state = opened(data)
    with pytest.raises(ValueError, match="epoch 0 is under way"):
        plan.take_over(replace(state, position=1, snapshot="older"))

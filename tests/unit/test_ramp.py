"""A global batch that grows: the sizes of its steps, and that no pack changes, is left out or seen twice by it."""

from __future__ import annotations

import functools
import json

import pytest

from grn_scale.config.check import check_layout
from grn_scale.config.data_schema import DataConfig
from grn_scale.config.load import load_config
from grn_scale.data.dataset import Dataset
from grn_scale.data.ledger import Ledger, record_step
from grn_scale.data.ledger_check import check_epoch
from grn_scale.data.loader import PackLoader
from grn_scale.data.packing import Cost
from grn_scale.data.plan import Plan
from grn_scale.data.ramp import packs_of_step
from grn_scale.data.state import DataState
from grn_scale.data_pipeline import index as index_command
from grn_scale.errors import ConfigError
from tests.helpers.token_dataset import write_tokens

RAMP = DataConfig(token_budget=128, packs_per_step=12, ramp_start=4, ramp_steps=4)
SIZES = [4, 4, 8, 8, 12, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens")
    write_tokens(path, range(6))
    return path


@pytest.fixture
def plan(folder) -> Plan:
    return Plan(Dataset.open(folder), seed=3, token_budget=128, window_shards=2, validation_fraction=0.1)


def steps_from(plan: Plan, state: DataState, step: int, data: DataConfig = RAMP, **changes) -> PackLoader:
    return PackLoader(plan, state, packs_per_step=functools.partial(packs_of_step, data), cost=Cost(100, 1), gamma=0.5,
                      step=step, **changes)


def take(plan: Plan, state: DataState, step: int, count: int, **changes) -> list:
    with steps_from(plan, state, step, **changes) as steps:
        return [next(steps) for _ in range(count)]


@pytest.mark.parametrize(("packs", "start", "steps", "sizes"), [
    (12, 4, 4, SIZES), (6, 0, 0, [6, 6]), (6, 6, 3, [6, 6]), (8, 2, 6, [2, 2, 4, 4, 6, 6, 8, 8]),
    (8, 2, 2, [2, 4, 8]),  # fewer steps than sizes: some are left out
    (6, 3, 5, [3] * 5 + [6]),
])
def test_the_sizes_of_the_steps(packs, start, steps, sizes):
    data = DataConfig(packs_per_step=packs, ramp_start=start, ramp_steps=steps)
    assert [packs_of_step(data, step) for step in range(len(sizes))] == sizes
    assert packs_of_step(data, 10**9) == packs


@pytest.mark.parametrize(("values", "words"), [
    ({"packs_per_step": 12, "ramp_start": 5, "ramp_steps": 4}, "must divide data.packs_per_step .*ramp_start=4 is the"),
    ({"packs_per_step": 4, "ramp_start": 8, "ramp_steps": 4}, "data.ramp_start=4 is the nearest"),
    ({"packs_per_step": 4, "ramp_start": 2}, "a ramp needs both"), ({"ramp_steps": 9}, "a ramp needs both"),
    ({"ramp_start": -1, "ramp_steps": -1}, "must not be negative"),
])
def test_a_ramp_that_cannot_be_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**values)


@pytest.mark.parametrize(("overrides", "world", "words"), [
    (["data.packs_per_step=12", "data.ramp_start=3"], 4, "multiple of the 4 data-parallel ranks .*ramp_start=4 is the"),
    (["data.packs_per_step=24", "data.ramp_start=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"], 4,
     r"2 data-parallel ranks x parallel.pipeline \(2, with virtual stages\) .*data.ramp_start=4 is the nearest"),
    (["data.packs_per_step=8", "data.ramp_start=2"], 2, None),
    (["data.packs_per_step=8", "data.ramp_start=4"], 4, None),
])
def test_the_first_step_must_fit_the_layout_too(overrides, world, words):
    config = load_config(None, [*overrides, "data.ramp_steps=10"])
    if words is None:
        check_layout(config, world)
    else:
        with pytest.raises(ConfigError, match=words):
            check_layout(config, world)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_every_world_size_takes_the_same_packs_and_weighs_each_step_as_a_whole(plan, dp_size):
    ranks = [take(plan, plan.start(), 0, len(SIZES), dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    state = plan.start()
    for size, steps in zip(SIZES, zip(*ranks)):
        packs, state = plan.next_step(state, size)
        assert all(step.packs == packs and step.state_after == state for step in steps)
        assert {len(step.micro_batches) for step in steps} == {size // dp_size}
        assert sum(steps[0].weights.values()) == pytest.approx(1) and all(s.weights == steps[0].weights for s in steps)
        read = sorted((m.pack for s in steps for m in s.micro_batches), key=lambda pack: pack.position)
        assert read == sorted(packs, key=lambda pack: pack.position)


def test_a_resume_at_any_step_and_at_another_size_goes_on_with_the_same_steps(plan):
    whole = take(plan, plan.start(), 0, len(SIZES))
    for step in range(1, len(SIZES)):
        state = DataState.from_dict(json.loads(json.dumps(whole[step - 1].state_after.to_dict())))
        rest = take(plan, state, step, len(SIZES) - step, dp_rank=1, dp_size=2)
        assert [s.packs for s in rest] == [s.packs for s in whole[step:]]
        assert plan.state_at(step, functools.partial(packs_of_step, RAMP)) == state


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_run_that_goes_back_takes_its_earlier_sizes_with_packs_it_has_not_read(plan, prefetch):
    with steps_from(plan, plan.start(), 0, prefetch=prefetch) as steps:
        before = [next(steps) for _ in range(3)]
        steps.go_back(1)
        after = [next(steps) for _ in range(2)]
    assert [len(step.packs) for step in before + after] == [4, 4, 8, 4, 8]
    packs = plan.next_step(plan.start(), 28)[0]
    assert [pack for step in before + after for pack in step.packs] == packs
    # A run resumed from a checkpoint behind the way back takes the same.
    assert [s.packs for s in take(plan, after[0].state_after, 2, 1)] == [s.packs for s in after[1:]]


def test_going_back_behind_the_end_of_an_epoch_still_asks_for_grown_datasets(plan):
    asked = []
    data = DataConfig(packs_per_step=plan.packs_in_epoch(0))
    with steps_from(plan, plan.start(), 0, data, renew=lambda plan: asked.append(1)) as steps:
        first = next(steps)
        steps.go_back(0)
        assert first.state_after.epoch == 1 and not asked
        assert next(steps).packs[0].epoch == 1 and asked == [1]


def test_the_ledger_proves_exactly_once_over_an_epoch_with_a_ramp_a_kill_and_a_way_back(plan, tmp_path):
    path = tmp_path / "ledger.jsonl"

    def run(state: DataState, batch: int, step: int, count: int, **changes) -> DataState:
        for data in take(plan, state, step, count, **changes):
            record_step(path, batch, data.packs, data.state_after.snapshot)
            batch, state = batch + 1, data.state_after
        return state

    saved = run(plan.start(), 0, 0, 2)
    run(saved, 2, 2, 2)  # lost: no checkpoint after it
    state = run(saved, 2, 2, 1, dp_size=4)
    batch = 3
    with steps_from(plan, state, 3) as steps:
        for data in steps:
            record_step(path, batch, data.packs, data.state_after.snapshot)
            batch += 1
            if batch == 4:
                steps.go_back(2)
            if data.state_after.epoch:
                break
    report = check_epoch(Ledger(path), plan, 0)
    assert report.exact and report.finished and report.visits == (plan.visits_in_epoch(0),)


def test_index_plan_shows_the_ramp(folder, capsys):
    argv = ["plan", "--dataset", str(folder), "--steps", "1:4", "data.token_budget=128", "data.packs_per_step=12",
            "data.ramp_start=4", "data.ramp_steps=4", "seed=3", "--json"]
    assert index_command.main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert [step["packs"] for step in document["steps"]] == SIZES[1:4]
    taken = [pack["position"] for step in document["steps"] for rank in step["ranks"] for pack in rank["packs"]]
    assert sorted(taken) == list(range(4, 24))

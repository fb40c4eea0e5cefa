"""Pipeline schedules: their order, and their replay against closed forms."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from grn_scale.errors import ConfigError
from grn_scale.planning.schedule import Schedule, Task
from grn_scale.planning.schedule_replay import replay

SHAPES = [(1, 1, 3), (2, 1, 1), (4, 1, 2), (4, 1, 8), (2, 2, 2), (4, 2, 4), (4, 2, 16), (3, 4, 9), (8, 3, 8)]


def equal(rows: int = 1, backward: float = 2.0):
    return lambda task: np.full(rows, backward if task.backward else 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_micro_batch_passes_every_chunk_once_each_way(shape):
    schedule = Schedule(*shape)
    for stage in range(schedule.pipeline):
        tasks = schedule.of_stage(stage)
        assert sorted(tasks) == [Task(stage, backward, chunk, micro_batch) for backward in (False, True)
                                 for chunk in range(schedule.virtual) for micro_batch in range(schedule.micro_batches)]


def test_the_order_is_that_of_megatron_core():
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for pipeline, virtual, micro_batches in [shape for shape in SHAPES if shape[0] > 1]:
        table = get_schedule_table(micro_batches, virtual, pipeline)
        for stage in range(pipeline):
            group = SimpleNamespace(size=lambda: pipeline, rank=lambda: stage)
            channel = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=virtual)
            if virtual == 1:
                channel.virtual_pipeline_model_parallel_size = None
            _, _, warm_up, _ = get_pp_rank_microbatches(micro_batches, virtual, pipeline, p2p_communicator=channel)
            tasks = Schedule(pipeline, virtual, micro_batches).of_stage(stage)
            forward = [task for task in tasks if not task.backward]
            backward = [task for task in tasks if task.backward]
            assert [(task.micro_batch, task.chunk) for task in forward] == table
            assert [(task.micro_batch, virtual - 1 - task.chunk) for task in backward] == table
            steady = tasks[warm_up:2 * len(table) - warm_up]
            assert tasks[:warm_up] == forward[:warm_up]
            assert [task.backward for task in steady] == [False, True] * (len(table) - warm_up)


def overlaps(schedule: Schedule) -> list[bool]:
    return [False, True] if schedule.virtual > 1 else [False]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backward", [1.0, 2.0, 3.0])
def test_equal_packs_have_the_bubble_of_the_closed_form(shape, backward):
    schedule = Schedule(*shape)
    work = schedule.micro_batches * schedule.virtual * (1 + backward)
    for overlap in overlaps(schedule):
        ends = replay(schedule, equal(2, backward), overlap=overlap)
        assert ends.shape == (2, schedule.pipeline)
        np.testing.assert_allclose(ends.max(axis=1) / work - 1, schedule.bubble, atol=1e-12)


def test_a_single_stage_takes_the_sum_of_its_passes():
    durations = np.random.default_rng(0).random((5, 3))
    ends = replay(Schedule(1, 1, 5), lambda task: durations[task.micro_batch] * (2 if task.backward else 1))
    np.testing.assert_allclose(ends[:, 0], 3 * durations.sum(axis=0))


@pytest.mark.parametrize("shape, overlap", [((4, 1, 8), False), ((4, 2, 8), False), ((4, 2, 8), True)])
def test_tasks_wait_for_their_input_and_for_their_stage(shape, overlap):
    schedule = Schedule(*shape)
    durations = np.random.default_rng(1).random((8, 2)) + 0.1
    begins, ends = {}, {}

    def observe(task, begin, end):
        begins[task], ends[task] = begin, end

    done = replay(schedule, lambda task: durations[task.micro_batch], transfer=0.25, overlap=overlap, observe=observe)
    last = schedule.pipeline * schedule.virtual - 1
    for task, begin in begins.items():
        part = task.chunk * schedule.pipeline + task.stage + (1 if task.backward else -1)
        if 0 <= part <= last:
            chunk, stage = divmod(part, schedule.pipeline)
            assert (begin >= ends[task._replace(stage=stage, chunk=chunk)] + 0.25).all()
    for stage in range(schedule.pipeline):
        mine = schedule.of_stage(stage)
        assert all((begins[after] >= ends[before]).all() for before, after in zip(mine, mine[1:]))
        assert (done[:, stage] >= ends[mine[-1]]).all()


def test_two_stages_are_as_worked_out_by_hand():
    seconds = np.array([3.0, 1.0, 2.0])
    ends = replay(Schedule(2, 1, 3), lambda task: seconds[task.micro_batch, None])
    # stage 0: F0 0-3, F1 3-4, B0 9-12, F2 12-14, B1 14-15, B2 18-20; stage 1: F0 3-6, B0 6-9, F1 9-10, B1 10-11, ...
    assert ends[0].tolist() == [20.0, 18.0]


@pytest.mark.parametrize("shape", [(4, 2, 16), (8, 3, 16)])
def test_exchanges_make_stages_wait_for_packs_that_overlapped_transfers_hide(shape):
    schedule, packs = Schedule(*shape), np.random.default_rng(2).lognormal(0, 0.3, (16, 20))
    waiting, hidden = (replay(schedule, lambda task: packs[task.micro_batch], overlap=overlap).max(axis=1)
                       for overlap in (False, True))
    assert (waiting >= hidden - 1e-9).all()
    assert 1.05 < (waiting / hidden).mean() < 1.3


def test_plain_1f1b_has_no_overlap():
    with pytest.raises(ConfigError, match="interleaved schedule only"):
        replay(Schedule(4, 1, 8), equal(), overlap=True)


@pytest.mark.parametrize("shape, words", [
    ((4, 2, 6), "take 4 or 8, or 1 chunk"), ((4, 2, 2), "take 4, or 1 chunk"), ((1, 2, 4), "nothing to interleave"),
    ((0, 1, 4), "at least 1"), ((2, 1, 0), "at least 1")])
def test_impossible_schedules_are_refused_with_the_nearest_possible(shape, words):
    with pytest.raises(ConfigError, match=words):
        Schedule(*shape)

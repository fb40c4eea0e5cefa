"""Steps as read from real shards: the same on every world size, resumable, and robust to bad samples."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from grn_scale import storage
from grn_scale.batch import Pack
from grn_scale.data.dataset import Dataset
from grn_scale.data.ledger import Ledger, record_step
from grn_scale.data.ledger_check import check_epoch
from grn_scale.data.loader import PackLoader, read_pack
from grn_scale.data.packing import Cost
from grn_scale.data.payloads import LocalPayloads
from grn_scale.data.plan import Plan
from grn_scale.data.split import held_out
from grn_scale.data.window import EMPTY_CAPTION
from grn_scale.data_pipeline import index as index_command
from grn_scale.errors import ConfigError, UserError
from tests.helpers.token_dataset import bits_of, states_of, write_tokens

COST = Cost(linear=100, quadratic=1)
SHARDS = 3


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, range(SHARDS))
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A dataset of 3 shards with 16 clips or images each and one caption a clip."""
    return shutil.copytree(written, tmp_path / "tokens")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", (0.0, 0.0))


def plan_of(dataset, **changes) -> Plan:
    settings = dict(seed=3, token_budget=128, caption_drop=0.2, i2v_share=0.5, window_shards=2,
                    validation_fraction=0.1)
    return Plan(dataset, **{**settings, **changes})


def open_loader(dataset, plan=None, state=None, **changes) -> PackLoader:
    plan = plan or plan_of(dataset)
    settings = dict(packs_per_step=4, cost=COST, gamma=0.5)
    return PackLoader(plan, state or plan.start(), **{**settings, **changes})


def take(dataset, count, **changes):
    with open_loader(dataset, **changes) as steps:
        return [next(steps) for _ in range(count)]


def damage(folder, key: str) -> None:
    """Flip one byte of a clip's bits in its tar."""
    dataset = Dataset.open(folder)
    row = next(row for shard in range(SHARDS) for row in dataset.rows(shard) if row.key == key)
    path = folder / dataset.info.video_shards[row.shard].name
    data = bytearray(path.read_bytes())
    data[row.offset] ^= 0xFF
    path.write_bytes(data)


def test_a_draw_carries_the_class_of_its_sample(folder):
    dataset = Dataset.open(folder)
    draws = [draw for p in plan_of(dataset).next_step(plan_of(dataset).start(), 4)[0] for draw in p.draws]
    assert [draw.class_id for draw in draws] == [dataset.locate(draw.row).class_id for draw in draws]


def test_a_step_holds_the_planned_draws_with_their_own_bytes(folder):
    dataset = Dataset.open(folder)
    plan = plan_of(dataset)
    (step,) = take(dataset, 1)
    assert step.packs == plan.next_step(plan.start(), 4)[0]
    assert sorted(m.pack.position for m in step.micro_batches) == [0, 1, 2, 3]
    for micro_batch in step.micro_batches:
        assert [sample.draw for sample in micro_batch.samples] == list(micro_batch.pack.draws)
        for sample in micro_batch.samples:
            number = int(sample.draw.key[4:])
            assert sample.valid
            np.testing.assert_array_equal(sample.bits, bits_of(number, sample.draw.thw))
            expected = 0 if sample.draw.caption == EMPTY_CAPTION else number
            assert torch.equal(sample.text_states, states_of(expected, sample.draw.text_tokens))
    assert step.weights.keys() == {d.index for p in step.packs for d in p.draws}
    assert sum(step.weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_ranks_share_the_same_packs_on_every_world_size(folder, dp_size):
    dataset = Dataset.open(folder)
    plan = plan_of(dataset)
    ranks = [take(dataset, 3, dp_rank=rank, dp_size=dp_size, packs_per_step=8) for rank in range(dp_size)]
    state = plan.start()
    for steps in zip(*ranks):
        packs, state = plan.next_step(state, 8)
        assert all(step.packs == packs and step.state_after == state for step in steps)
        assert all(step.weights == steps[0].weights for step in steps)
        assert {len(step.micro_batches) for step in steps} == {8 // dp_size}
        read = [m.pack for step in steps for m in step.micro_batches]
        assert sorted(read, key=lambda p: p.position) == sorted(packs, key=lambda p: p.position)


def test_stop_and_resume_on_another_size_equals_the_uninterrupted_stream(folder):
    dataset = Dataset.open(folder)

    def packs_on(dp_size, state, count, packs_per_step):
        ranks = [take(dataset, count, state=state, dp_rank=rank, dp_size=dp_size, packs_per_step=packs_per_step)
                 for rank in range(dp_size)]
        packs = [m.pack for steps in zip(*ranks) for s in steps for m in s.micro_batches if m.pack.draws]
        return sorted(packs, key=lambda p: (p.epoch, p.position)), ranks[0][-1].state_after

    whole, end = packs_on(1, None, 12, 1)
    first, state = packs_on(2, None, 2, 4)
    rest, resumed_end = packs_on(4, type(state).from_dict(json.loads(json.dumps(state.to_dict()))), 1, 4)
    assert first + rest == whole
    assert resumed_end == end


def test_reading_does_not_depend_on_threads_or_prefetch(folder):
    def content(**changes):
        return [[(s.draw, s.bits.tobytes()) for m in step.micro_batches for s in m.samples]
                for step in take(Dataset.open(folder), 4, **changes)]

    assert content(threads=1, prefetch=0) == content(threads=4, prefetch=3)


def test_a_corrupt_sample_keeps_its_slot_as_zeros_and_is_named(folder, caplog):
    key = plan_of(Dataset.open(folder)).next_step(plan_of(Dataset.open(folder)).start(), 4)[0][1].draws[0].key
    (healthy,) = take(Dataset.open(folder), 1)
    damage(folder, key)
    (step,) = take(Dataset.open(folder), 1)
    assert step.packs == healthy.packs and step.weights == healthy.weights
    samples = [s for m in step.micro_batches for s in m.samples]
    (bad,) = [s for s in samples if not s.valid]
    original = next(s for m in healthy.micro_batches for s in m.samples if s.draw.key == key)
    assert bad.draw == original.draw and bad.bits.shape == original.bits.shape and not bad.bits.any()
    assert bad.text_states.shape == original.text_states.shape and not bad.text_states.any()
    assert [(b.key, b.unreadable) for b in step.bad] == [(key, False)]
    assert step.bad[0].shard.startswith("video-") and "checksum" in step.bad[0].reason
    assert key in caplog.text
    assert step.state_after.skip == ()


class Flaky(LocalPayloads):
    """Reads at some places of the shards fail a number of times."""

    failures: dict[tuple[str, int], int]

    def _read(self, shard, offset, length):
        if self.failures.get((shard.name, offset), 0):
            self.failures[shard.name, offset] -= 1
            raise OSError(5, "Input/output error")
        return super()._read(shard, offset, length)


def flaky(folder, failures) -> Dataset:
    """A dataset whose reads of the clips with these keys fail a number of times."""
    dataset = Dataset.open(folder)
    dataset._payloads = Flaky(storage.LocalStorage(folder))
    dataset._payloads.failures = {
        (info.name, row.offset): failures[row.key] for shard, info in enumerate(dataset.info.video_shards)
        for row in dataset.rows(shard) if row.key in failures}
    return dataset


def planned_keys(folder, packs_per_step=4):
    plan = plan_of(Dataset.open(folder))
    return [draw.key for p in plan.next_step(plan.start(), packs_per_step)[0] for draw in p.draws]


def test_a_read_that_fails_twice_is_tried_again_and_succeeds(folder):
    key = planned_keys(folder)[0]
    (step,) = take(flaky(folder, {key: 2}), 1)
    assert all(s.valid for m in step.micro_batches for s in m.samples) and not step.bad


def test_a_read_that_fails_three_times_enters_the_skip_list_and_is_not_read_again(folder):
    key = planned_keys(folder)[0]
    dataset = flaky(folder, {key: 3})
    steps = take(dataset, 3)
    assert [b.key for b in steps[0].bad] == [key] and steps[0].bad[0].unreadable
    assert [step.state_after.skip for step in steps] == [(key,)] * 3
    # The next reading would succeed, but what is skipped stays skipped: also after a resume, at its slot.
    (again,) = take(dataset, 1, state=plan_of(dataset).start().with_skips([key]))
    assert [s.draw.key for m in again.micro_batches for s in m.samples if not s.valid] == [key]
    assert again.bad == [] and set(dataset._payloads.failures.values()) == {0}


def test_a_dataset_without_text_states_gives_token_ids(tmp_path):
    write_tokens(tmp_path, range(1), kind="none")
    dataset = Dataset.open(tmp_path)
    packs, _ = plan_of(dataset).next_step(plan_of(dataset).start(), 2)
    key = packs[0].draws[0].key
    for pack in packs:
        for sample in read_pack(dataset, pack, skip=[key]):
            skipped = sample.draw.key == key
            assert sample.text_states is None and sample.valid != skipped
            assert sample.text_ids == (0 if skipped else 2,) * sample.draw.text_tokens
    longer = replace(packs[0].draws[0], text_tokens=9)
    (sample,) = read_pack(dataset, Pack(0, 0, (longer,)), on_bad=(found := []).append)
    assert not sample.valid and "token ids, but the index says 9" in found[0].reason


def test_bytes_of_another_shape_than_the_index_are_corrupt(folder):
    dataset = Dataset.open(folder)
    pack = plan_of(dataset).next_step(plan_of(dataset).start(), 1)[0][0]
    draw = replace(pack.draws[0], text_tokens=pack.draws[0].text_tokens + 1)
    other = replace(pack.draws[1], thw=(9, 4, 4))
    found = []
    samples = read_pack(dataset, Pack(0, 0, (draw, other)), on_bad=found.append)
    assert [s.valid for s in samples] == [False, False]
    assert "states of shape" in found[0].reason and "(9, 4, 4) latent cells" in found[1].reason


def threads_of_loaders() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("grn-")]


def test_errors_of_the_reading_thread_reach_the_consumer_and_close_the_loader(folder):
    class Broken(Dataset):
        def read_text(self, ref):
            raise UserError(f"no text entry {ref.key}")

    steps = open_loader(Broken.open(folder))
    with pytest.raises(UserError, match="no text entry"):
        next(steps)
    assert threads_of_loaders() == []
    with pytest.raises(StopIteration):
        next(steps)


def test_close_stops_the_threads_while_steps_wait(folder):
    steps = open_loader(Dataset.open(folder), prefetch=1)
    next(steps)
    steps.close()
    steps.close()
    assert threads_of_loaders() == []
    assert list(steps) == []


def test_a_step_that_does_not_divide_by_the_ranks_is_refused(folder):
    for settings, message in (({"packs_per_step": 7, "dp_size": 4}, "7 packs cannot be cut for 4 ranks"),
                              ({"dp_rank": 1}, "no rank 1 of 1")):
        with pytest.raises(ValueError, match=message):
            open_loader(Dataset.open(folder), **settings)


def test_a_dataset_smaller_than_a_step_is_refused_for_training_and_filled_up_for_validation(folder):
    dataset = Dataset.open(folder)
    with pytest.raises(ConfigError, match="too small for a step: .* Set data.packs_per_step to at most"):
        open_loader(dataset, packs_per_step=64)
    (step,) = take(dataset, 1, plan=plan_of(dataset, split="validation"), packs_per_step=64)
    keys = {d.key for p in step.packs for d in p.draws}
    assert keys == {row.key for s in range(SHARDS) for row in dataset.rows(s) if held_out(row.key, 0.1)}
    assert len(step.micro_batches) == 64 and step.micro_batches[-1].samples == []


def test_a_state_of_another_snapshot_is_refused_before_anything_is_read(folder):
    with pytest.raises(ConfigError, match="belongs to snapshot other"):
        open_loader(Dataset.open(folder), state=replace(plan_of(Dataset.open(folder)).start(), snapshot="other"))


def test_the_ledger_proves_exactly_once_over_a_kill_and_a_resume_at_another_size(folder, tmp_path):
    dataset, path = Dataset.open(folder), tmp_path / "ledger.jsonl"
    plan = plan_of(dataset)

    def run(state, step, until, packs_per_step):
        with open_loader(dataset, plan, state, packs_per_step=packs_per_step) as steps:
            for data in steps:
                record_step(path, step, data.packs, data.state_after.snapshot)
                state, step = data.state_after, step + 1
                if until(state, step):
                    return state, step

    state, step = run(plan.start(), 0, lambda state, step: step == 2, 2)
    run(state, step, lambda state, step: step == 5, 2)  # lost: no checkpoint after it
    report = check_epoch(Ledger(path), plan, 0)
    assert report.exact and not report.finished and report.steps == 5
    run(state, step, lambda state, step: state.epoch == 1, 4)
    report = check_epoch(Ledger(path), plan, 0)
    assert report.exact and report.finished and report.visits == (plan.visits_in_epoch(0),)
    keys = {draws.keys[i] for draws in Ledger(path).draws(0) for i in range(len(draws))}
    assert keys == {row.key.encode() for s in range(SHARDS) for row in dataset.rows(s) if not held_out(row.key, 0.1)}


@pytest.mark.parametrize("line", [
    '{"step": 1}', "", "step", '{"step":1,"snapshot":"a","epoch":0,"draws":[[0,"k"',
    '{"step":1,"snapshot":"a","epoch":0,"draws":[[0,"k"]]}', '{"step":1,"snapshot":"a","epoch":0,"draws":[["k",0,0]]}',
    '{"step":1,"snapshot":"a","epoch":0,"draws":[[0,"' + 33 * "k" + '",0]]}',
    '{"step":1,"snapshot":"a","epoch":0,"draws":[[0,"\u00e4",0]]}',
    '{"step":1,"snapshot":"a","epoch":0,"draws":[[99999999999999999999,"k",0]]}'])
def test_a_line_that_is_no_ledger_line_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    record_step(path, 0, [Pack(0, 0, ())], "snapshot")
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match="ledger.jsonl:2: not a line of a ledger"):
        list(Ledger(path).draws(0))


PLAN = ["data.token_budget=128", "data.packs_per_step=4", "data.validation_fraction=0.1", "seed=3"]


def test_index_plan_prints_what_the_ranks_will_read_without_opening_a_shard(folder, capsys):
    argv = ["plan", "--dataset", str(folder), "--world-size", "4", "--steps", "2:4", "--json", *PLAN,
            "parallel.tensor=2"]
    dataset = Dataset.open(folder)
    plan = plan_of(dataset, caption_drop=0.1, i2v_share=0.0, window_shards=16)
    expected = [take(dataset, 4, plan=plan, dp_rank=rank, dp_size=2, cost=Cost.of_shape(8, 192, 768))[2:]
                for rank in range(2)]
    for shard in dataset.info.video_shards:
        os.truncate(folder / shard.name, 0)
        os.truncate(folder / shard.name, shard.bytes)
    assert index_command.main(argv) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["data_parallel_size"] == 2 and document["processes"] == [[0, 1], [2, 3]]
    assert [s["step"] for s in document["steps"]] == [2, 3]
    for number, step in enumerate(document["steps"]):
        for rank in step["ranks"]:
            read = [[d.key for d in m.pack.draws] for m in expected[rank["rank"]][number].micro_batches]
            assert [[s["id"] for s in p["samples"]] for p in rank["packs"]] == read
        assert 0 < step["fill"] <= 1 <= step["max_over_mean_cost"]


def test_index_plan_prints_lines_for_people(folder, capsys):
    assert index_command.main(["plan", *PLAN, f"data.dataset={folder}"]) == 0
    out = capsys.readouterr().out
    assert "step 0  epoch 0  4 packs  fill" in out and "rank 0  pack" in out and "clip0" in out


@pytest.mark.parametrize(("extra", "message"), [
    (["--steps", "3:3"], "must be A:B with A < B"), (["--steps", "x"], "must be A:B"),
    (["--world-size", "3", "parallel.tensor=2"], "the job has 3 processes"),
    (["--world-size", "8"], "multiple of the 8 data-parallel ranks")])
def test_index_plan_refuses_what_cannot_be_planned(folder, extra, message):
    with pytest.raises(ConfigError, match=message):
        index_command.main(["plan", *PLAN, f"data.dataset={folder}", *extra])


def test_index_plan_asks_for_a_dataset():
    with pytest.raises(ConfigError, match="no dataset is set: give data.dataset=DIR"):
        index_command.main(["plan"])

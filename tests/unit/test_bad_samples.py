"""The record of bad samples over the starts of a run (several processes: tests/distributed/test_bad_samples.py)."""

from __future__ import annotations

import json

import pytest

from grn_scale.checkpoint.ranks import Ranks
from grn_scale.data.dataset import Dataset
from grn_scale.data.loader import BadSample, PackLoader
from grn_scale.data.packing import Cost
from grn_scale.data.plan import Plan
from grn_scale.errors import DoNotRequeue, UserError
from grn_scale.train.bad_samples import FILE_NAME, BadSamples
from tests.helpers.dataset import flip_byte
from tests.helpers.token_dataset import write_tokens

ALONE = Ranks(alone=True)


def bad(key):
    return BadSample("video-000000.tar", key, "checksum differs", unreadable=False)


def start(folder, limit=9, skipped=()):
    return BadSamples(folder, limit, skipped, ALONE)


def lines(folder):
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_a_sample_is_written_once_over_all_starts_and_not_when_it_is_skipped(tmp_path):
    record = start(tmp_path, skipped=["known"])
    record.add(3, [bad("a"), bad("known"), bad("a")])
    record.add(4, [bad("a")])
    record = start(tmp_path)
    record.add(2, [bad("b"), bad("a")])
    assert [(line["step"], line["key"]) for line in lines(tmp_path)] == [(3, "a"), (2, "b")]
    assert lines(tmp_path)[0] == {"step": 3, "shard": "video-000000.tar", "key": "a", "reason": "checksum differs",
                                  "unreadable": False}


def test_the_limit_holds_over_all_starts_and_a_higher_one_lets_the_run_go_on(tmp_path):
    start(tmp_path, 2).add(1, [bad("a")])
    start(tmp_path, 2).add(1, [bad("b")])
    with pytest.raises(DoNotRequeue, match="3 samples are corrupt .* more than data.bad_sample_limit=2; the last is c"):
        start(tmp_path, 2).add(1, [bad("c")])
    with pytest.raises(DoNotRequeue, match="3 samples .* before this start.*raise the limit, or move that file away"):
        start(tmp_path, 2)
    start(tmp_path, 3).add(1, [bad("a")])
    (tmp_path / FILE_NAME).rename(tmp_path / "aside")
    start(tmp_path, 2).add(1, [bad("a")])
    assert [line["key"] for line in lines(tmp_path)] == ["a"]


def test_what_the_checkpoint_of_another_run_leaves_out_counts(tmp_path):
    start(tmp_path, 2, ["x", "y"])
    with pytest.raises(DoNotRequeue, match="2 samples .* more than data.bad_sample_limit=1"):
        start(tmp_path, 1, ["x", "y"])
    assert list(tmp_path.iterdir()) == []


def test_starts_that_each_read_a_few_damaged_samples_reach_the_limit(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_tokens(tmp_path / "tokens", range(1))
    dataset = Dataset.open(tmp_path / "tokens")
    damaged = [row for row in dataset.rows(0) if row.row % 3 == 0]
    for row in damaged:
        flip_byte(tmp_path / "tokens/video-000000.tar", row.offset)
    plan = Plan(dataset, seed=1, token_budget=128)
    state, met = plan.start(), []
    for _ in range(20):  # each from the checkpoint of the one before, which does not tell of corrupt samples
        try:
            record = start(run, 3, state.skip)
            with PackLoader(plan, state, packs_per_step=1, cost=Cost(1, 1), gamma=1.0, prefetch=0) as steps:
                data = next(steps)
            record.add(1, data.bad)
        except DoNotRequeue:
            break
        state = data.state_after
        assert state.skip == ()
        met.append(len(data.bad))
    found = {line["key"] for line in lines(run)}
    assert len(met) > 1 and max(met) <= 3 < len(lines(run)) == len(found) and found <= {row.key for row in damaged}


@pytest.mark.parametrize("tail", [b'{"st', b"\0\0\0\0\n", b'{"step": 1}\n', b"[]\n", b'\xff"\n'])
def test_a_damaged_last_line_is_cut_off(tmp_path, tail):
    start(tmp_path).add(1, [bad("a")])
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole + tail)
    record = start(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == whole
    record.add(2, [bad("a"), bad("b")])
    assert [line["key"] for line in lines(tmp_path)] == ["a", "b"]


def test_a_damaged_line_in_the_middle_stops_the_start_by_name(tmp_path):
    start(tmp_path).add(1, [bad("a")])
    content = (tmp_path / FILE_NAME).read_text()
    (tmp_path / FILE_NAME).write_text(f"{content}scratch\n{content}")
    with pytest.raises(DoNotRequeue, match="bad_samples.jsonl:2: no line of a record .* mend or remove the line"):
        start(tmp_path)


def test_a_full_disk_and_an_unreadable_file_are_one_clear_error(tmp_path):
    record = start(tmp_path)
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    with pytest.raises(UserError, match="bad_samples.jsonl: no space left"):
        record.add(1, [bad("a")])
    (tmp_path / FILE_NAME).unlink()
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(UserError, match="bad_samples.jsonl cannot be read: Is a directory"):
        start(tmp_path)

"""The record of bad samples over several processes."""

from __future__ import annotations

import json

import pytest

from grn_scale.data.loader import BadSample
from grn_scale.errors import DoNotRequeue, UserError
from grn_scale.train.bad_samples import FILE_NAME, BadSamples


def bad(key):
    return BadSample("video-000000.tar", key, "checksum differs", unreadable=False)


def test_what_all_processes_find_is_written_once(tmp_path):
    record = BadSamples(tmp_path, 10, ["known"], lambda mine: [mine, [bad("b"), bad("known")], [bad("b")]])
    record.add(3, [bad("a")])
    record.add(4, [bad("a")])
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [(line["step"], line["key"]) for line in lines] == [(3, "a"), (3, "b")]
    assert lines[0] == {"step": 3, "shard": "video-000000.tar", "key": "a", "reason": "checksum differs",
                        "unreadable": False}


def test_a_full_disk_is_one_clear_error_and_an_unfinished_line_is_cut_off(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / FILE_NAME).symlink_to("/dev/full")
    with pytest.raises(UserError, match="bad_samples.jsonl: no space left"):
        BadSamples(tmp_path / "full", 9, [], lambda mine: [mine]).add(1, [bad("a")])
    (tmp_path / FILE_NAME).write_text('{"step": 1}\n{"ste')
    BadSamples(tmp_path, 9, [], lambda mine: [mine]).add(2, [bad("a")])
    assert [json.loads(line)["step"] for line in (tmp_path / FILE_NAME).read_text().splitlines()] == [1, 2]


def test_more_than_the_limit_over_all_processes_stop_each_of_them_for_good(tmp_path):
    everywhere = [[bad("a")], [bad("b")]]
    for writes in (True, False):
        record = BadSamples(tmp_path, 2, ["before"], lambda mine: everywhere, writes=writes)
        with pytest.raises(DoNotRequeue, match="3 samples are corrupt .* more than data.bad_sample_limit=2.*b in"):
            record.add(1, [])
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 2

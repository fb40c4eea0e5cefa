"""dataset.json and its summaries: what they add up, snapshots, and damage that is refused by name."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data.dataset_info import read_dataset_info, snapshot_name, snapshots, write_dataset
from grn_scale.data.index_parts import write_video_part
from grn_scale.data.schema import IndexRow, ShardInfo
from grn_scale.errors import UserError
from tests.helpers.dataset import flip_byte, make_dataset, part_of, write_videos


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "tokens")
    return tmp_path / "tokens"


def test_the_summary_adds_up_what_a_plan_needs_of_a_shard(folder):
    first, second = read_dataset_info(folder).video_shards
    assert (first.samples, first.images, first.tokens, first.longest) == (3, 0, 36, 12 + 3 + 1)
    assert (second.samples, second.images, second.tokens, second.longest) == (2, 0, 24, 12 + 5 + 1)
    images = [IndexRow(0, 0, "a", 0, 0, 0, (1, 2, 2), 1.0, ()), IndexRow(0, 1, "b", 0, 0, 0, (2, 2, 2), 1.0, ())]
    info = write_video_part(folder, ShardInfo("video-000009.tar", 2, 0, ""), images, empty_tokens=7)
    assert (info.images, info.tokens, info.longest) == (1, 12, 8 + 7 + 1)


def test_an_earlier_snapshot_stays_readable_when_the_dataset_grows(folder):
    old = Dataset.open(folder)
    info = old.info
    new = write_dataset(folder, replace(info, video_shards=(*info.video_shards, write_videos(folder, 2, range(5, 8)))))
    assert new.samples == 8 and new.snapshot != info.snapshot
    assert Dataset.open(folder).info == new
    assert read_dataset_info(folder, info.snapshot) == read_dataset_info(folder, info.snapshot[:16]) == info
    assert snapshots(folder) == sorted((info.snapshot[:16], new.snapshot[:16]))
    assert Dataset.open(folder, snapshot=info.snapshot[:16]).shard_sizes == [3, 2]
    for unknown, message in (("f" * 64, "has no snapshot ffff.*it has .*" + info.snapshot[:16]), ("ff", "names no")):
        with pytest.raises(UserError, match=message):
            Dataset.open(folder, snapshot=unknown)


def test_a_changed_caption_gives_a_new_part_and_leaves_the_old_one(folder):
    info = read_dataset_info(folder)
    rows = [replace(row, captions=()) for row in Dataset.open(folder).rows(0)]
    shard = write_video_part(folder, info.video_shards[0], rows)
    assert shard.sha256 == info.video_shards[0].sha256 and shard.part != info.video_shards[0].part
    assert write_dataset(folder, replace(info, video_shards=(shard, info.video_shards[1]))).snapshot != info.snapshot
    assert Dataset.open(folder).locate(0).captions == ()
    assert Dataset.open(folder, info.snapshot).locate(0).captions != ()


def test_a_missing_a_truncated_and_a_foreign_dataset_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match="has no dataset.json"):
        Dataset.open(tmp_path)
    os.truncate(folder / "text-000001.tar", 700)
    with pytest.raises(UserError, match="text-000001.tar has 700 bytes"):
        Dataset.open(folder)
    (folder / "text-000001.tar").unlink()
    with pytest.raises(UserError, match="text-000001.tar is missing"):
        Dataset.open(folder)
    part_of(folder, "video-000000").unlink()
    with pytest.raises(UserError, match="index part .*video-000000-.*parquet is missing"):
        Dataset.open(folder)
    assert Dataset.open(folder, check_files=False).info.samples == 5
    values = json.loads((folder / "dataset.json").read_text())
    for change, message in (({"format_version": 1}, "format version 1"), ({"surplus": 1}, "does not say what"),
                            ({"snapshot": 3}, "names no snapshot"), ({"snapshot": "0" * 64}, "has no snapshot")):
        (folder / "dataset.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            Dataset.open(folder)
    for content in ("{", "[]", "{}"):
        (folder / "dataset.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read|format version None"):
            Dataset.open(folder)


def test_a_summary_that_was_changed_is_refused(folder):
    info = read_dataset_info(folder)
    path = folder / snapshot_name(info.snapshot)
    good = path.read_bytes()
    grown = write_dataset(folder, replace(info, video_shards=info.video_shards[:1]))
    path.write_bytes((folder / snapshot_name(grown.snapshot)).read_bytes())
    with pytest.raises(UserError, match="are not those of snapshot"):
        read_dataset_info(folder, info.snapshot)
    path.write_bytes(good[:-20])
    with pytest.raises(UserError, match="cannot be read"):
        read_dataset_info(folder, info.snapshot)
    write_dataset(folder, info)
    flip_byte(path, 40)
    with pytest.raises(UserError, match="damaged or was replaced"):
        read_dataset_info(folder)
    path.write_bytes(part_of(folder, "text-000000").read_bytes())
    with pytest.raises(UserError, match="other columns"):
        read_dataset_info(folder, info.snapshot)
    with pytest.raises(ValueError, match="has no index part"):
        write_dataset(folder, replace(info, text_shards=(ShardInfo("text-000009.tar", 1, 2, ""),)))

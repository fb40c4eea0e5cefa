"""Token shards: what is written is read back, the same input gives the same bytes, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash

from grn_scale.batch import TASKS
from grn_scale.data.columns import key_hashes
from grn_scale.data.dataset import CorruptSample, Dataset
from grn_scale.data.dataset_info import read_dataset_info, write_dataset
from grn_scale.data.index_parts import write_video_part
from grn_scale.data.schema import Caption, IndexRow, ShardInfo, TextRef
from grn_scale.data.shard_writer import write_shard
from grn_scale.errors import UserError
from tests.helpers.dataset import (
    THW,
    bits_of,
    dataset_of,
    flip_byte,
    make_dataset,
    part_of,
    states_of,
    text_key_of,
    text_of,
    write_texts,
)


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "tokens")
    return tmp_path / "tokens"


def test_what_was_written_is_read_back(folder):
    dataset = Dataset.open(folder)
    assert dataset.shard_sizes == [3, 2] and dataset.snapshot == dataset.info.snapshot
    assert (dataset.info.samples, dataset.info.tokens) == (5, 60)
    for number in range(5):
        row = dataset.locate(number)
        assert (row.row, row.key, row.shard) == (number, f"clip{number}", int(number >= 3))
        assert row == dataset.rows(row.shard)[number - (0, 3)[row.shard]]
        assert row.thw == THW and row.ratio_key == 0.561 and row.class_id == (number if number % 2 else None)
        assert row.captions == (Caption("short", {"T2V": text_of(number)}),)
        assert dataset.read_bits(row).tobytes() == bits_of(number)
    for number in range(7):
        assert torch.equal(dataset.read_text(text_of(number)), states_of(number))
        assert dataset.read_text_ids(text_of(number)) == [number] * len(states_of(number))
    for row in (-1, 5):
        with pytest.raises(IndexError):
            dataset.locate(row)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_texts_without_states_give_their_ids_and_int8_states_come_back_as_bf16(tmp_path, kind):
    make_dataset(tmp_path, kind)
    dataset = Dataset.open(tmp_path)
    assert dataset.info.text_states == kind and dataset.read_text_ids(text_of(6)) == [6, 6]
    if kind == "none":
        with pytest.raises(UserError, match="only its token ids"):
            dataset.read_text(text_of(1))
    else:
        states = dataset.read_text(text_of(6))
        assert states.dtype == torch.bfloat16
        torch.testing.assert_close(states, states_of(6), rtol=0.02, atol=0.02)


def test_columns_hold_what_the_rows_hold(tmp_path):
    hexadecimal = "00000000000000ff" + "1234567890abcdef"
    texts = {task: TextRef("t", 5 + i, "text-000000.tar") for i, task in enumerate(TASKS)}
    rows = [IndexRow(0, 0, hexadecimal, 0, 8, 1, (3, 4, 5), 0.5, (Caption("", texts), Caption("long", {})), 7),
            IndexRow(0, 1, "short", 8, 8, 2, (1, 2, 2), 1.0, ()),
            IndexRow(0, 2, "f" * 32, 16, 8, 3, (1, 2, 2), 1.0, (Caption("", {"T2I": texts["T2V"]}),))]
    with write_shard(tmp_path / "video-000000.tar") as writer:
        for row in rows:
            writer.add_video(row.key, b"", {})
    text = write_texts(tmp_path, 0, range(1))
    write_dataset(tmp_path, dataset_of([write_video_part(tmp_path, writer.info, rows)], [text]))
    columns = Dataset.open(tmp_path).columns(0)
    assert columns.keys.tolist() == [row.key.encode() for row in rows] and len(columns) == 3
    assert columns.key_hash.dtype == np.uint64
    assert columns.key_hash.tolist() == [255, xxhash.xxh3_64_intdigest(b"short"), 2**64 - 1]
    assert columns.thw.dtype == np.int32 and columns.thw.tolist() == [[3, 4, 5], [1, 2, 2], [1, 2, 2]]
    assert columns.ratio_key.tolist() == [0.5, 1.0, 1.0] and columns.class_id.tolist() == [7, -1, -1]
    assert columns.caption_first.tolist() == [0, 2, 2, 3]
    assert columns.caption_tokens.dtype == np.int32
    assert columns.caption_tokens.tolist() == [[5, 6, 7], [0, 0, 0], [6, 0, 0]]
    assert key_hashes(np.zeros(0, "S32")).tolist() == []


def test_the_same_samples_give_the_same_bytes(tmp_path):
    assert make_dataset(tmp_path / "a") == make_dataset(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 10
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_the_recorded_sha256_and_size_are_those_of_the_file(folder):
    for shard in read_dataset_info(folder).video_shards:
        data = (folder / shard.name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (shard.sha256, shard.bytes)


def test_plain_webdataset_streams_the_shards(folder):
    import webdataset

    videos = list(webdataset.WebDataset(str(folder / "video-{000000..000001}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in videos] == [f"clip{i}" for i in range(5)]
    assert [sample["bits"] for sample in videos] == [bits_of(i) for i in range(5)]
    about = json.loads(videos[1]["json"])
    assert about["id"] == 1 and about["sha256"] == hashlib.sha256(bits_of(1)).hexdigest() and len(about["xxh3"]) == 16
    texts = list(webdataset.WebDataset(str(folder / "text-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in texts] == [text_key_of(i) for i in range(4)]
    assert json.loads(texts[2]["json"]) == {"ids": [2, 2, 2]}


def test_only_the_part_of_a_shard_is_read_and_then_kept(folder):
    dataset = Dataset.open(folder)
    dataset.rows(1)
    part_of(folder, "video-000001").unlink()
    assert len(dataset.rows(1)) == 2
    part_of(folder, "video-000000").unlink()
    with pytest.raises(UserError, match="video-000000-.*parquet is missing"):
        dataset.rows(0)


def test_a_text_is_found_in_the_shard_that_its_reference_names(folder):
    info = read_dataset_info(folder)
    twice = write_texts(folder, 2, (1, 5))
    write_dataset(folder, replace(info, text_shards=(*info.text_shards, twice)))
    dataset = Dataset.open(folder)
    for ref in (text_of(1), replace(text_of(1), shard="text-000002.tar")):
        assert torch.equal(dataset.read_text(ref), states_of(1))
    with pytest.raises(UserError, match="text-000000.tar has no text entry"):
        dataset.read_text(replace(text_of(5), shard="text-000000.tar"))
    with pytest.raises(UserError, match="has no text shard 'other.tar'"):
        dataset.read_text(replace(text_of(5), shard="other.tar"))


def test_several_threads_and_a_pickled_copy_read_the_same(folder):
    # our own bytes, of this process: worker processes receive a dataset this way
    dataset = pickle.loads(pickle.dumps(Dataset.open(folder)))
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda i: dataset.read_text(text_of(i % 7)), range(200)))
        bits = list(pool.map(lambda i: dataset.read_bits(dataset.locate(i % 5)).tobytes(), range(200)))
    assert all(torch.equal(state, states_of(i % 7)) for i, state in enumerate(states))
    assert bits == [bits_of(i % 5) for i in range(200)]


def test_a_flipped_byte_is_a_corrupt_sample_with_shard_and_key(folder):
    dataset = Dataset.open(folder)
    row = dataset.locate(4)
    flip_byte(folder / "video-000001.tar", row.offset + 3)
    with pytest.raises(CorruptSample, match="video-000001.tar.*clip4.*checksum") as caught:
        dataset.read_bits(row)
    assert (caught.value.shard, caught.value.key) == ("video-000001.tar", "clip4")
    dataset.read_bits(dataset.locate(3))
    text = dataset.text_row(text_of(6))
    for offset, read in ((text.states_offset, dataset.read_text), (text.ids_offset, dataset.read_text_ids)):
        flip_byte(folder / "text-000001.tar", offset)
        with pytest.raises(CorruptSample, match="text-000001.tar"):
            read(text_of(6))


def test_a_payload_beyond_the_end_is_a_corrupt_sample(folder):
    dataset = Dataset.open(folder)
    row = dataset.locate(4)
    os.truncate(folder / "video-000001.tar", row.offset + 4)
    with pytest.raises(CorruptSample, match="ends after 4 of its"):
        dataset.read_bits(row)


def test_after_a_failed_read_the_file_is_opened_anew(folder, monkeypatch):
    dataset, row = Dataset.open(folder), Dataset.open(folder).locate(0)
    dataset.read_bits(row)
    (folder / "aside.tar").write_bytes((folder / "video-000000.tar").read_bytes())
    (folder / "aside.tar").replace(folder / "video-000000.tar")  # as a remounted file system: the old handle is stale

    def stale(*arguments):
        monkeypatch.undo()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    dataset.read_bits(row)
    flip_byte(folder / "video-000000.tar", row.offset)
    with pytest.raises(CorruptSample):
        dataset.read_bits(row)


def test_another_tokenizer_is_refused(folder):
    dataset = Dataset.open(folder)
    dataset.check_tokenizer("tokenizer")
    with pytest.raises(UserError, match="tokenizer.path"):
        dataset.check_tokenizer("other")


def test_a_damaged_or_foreign_index_part_is_refused_by_name(folder):
    info = read_dataset_info(folder)
    part = part_of(folder, "video-000000")
    flip_byte(part, 40)
    with pytest.raises(UserError, match="video-000000-.*damaged: its sha256"):
        Dataset.open(folder).rows(0)
    first, second = info.video_shards
    for wrong, message in (
            (replace(first, part=second.part, part_sha256=second.part_sha256), "has 2 rows, but the summary says 3"),
            (replace(first, part=info.text_shards[0].part, part_sha256=info.text_shards[0].part_sha256), "columns")):
        write_dataset(folder, replace(info, video_shards=(wrong, second)))
        with pytest.raises(UserError, match=message):
            Dataset.open(folder).rows(0)


def test_keys_that_webdataset_would_split_and_parts_of_other_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dot or slash"), write_shard(tmp_path / "a.tar") as writer:
        writer.add_video("a.b", b"", {})
    with pytest.raises(ValueError, match="already"), write_shard(tmp_path / "a.tar") as writer:
        writer.add_video("a", b"", {})
        writer.add_video("a", b"", {})
    row = IndexRow(0, 0, "k" * 33, 0, 0, 0, THW, 1.0, ())
    with pytest.raises(ValueError, match="longer than 32"):
        write_video_part(tmp_path, ShardInfo("video-000000.tar", 1, 0, ""), [row])
    with pytest.raises(ValueError, match="has 2 samples, but the part 1 rows"):
        write_video_part(tmp_path, ShardInfo("video-000000.tar", 2, 0, ""), [replace(row, key="k")])
    assert list(tmp_path.iterdir()) == []

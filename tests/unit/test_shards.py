"""Token shards: what is written is read back, the same input gives the same bytes, and damage is named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from grn_scale.atomic import atomic_file
from grn_scale.data.index_parts import part_path, snapshot_of, write_text_part, write_video_part
from grn_scale.data.schema import FORMAT_VERSION, Caption, DatasetInfo, IndexRow, TextRef
from grn_scale.data.shards import CorruptSample, Dataset, read_dataset_info, write_dataset_info, write_shard
from grn_scale.errors import UserError

THW, BITS = (2, 2, 3), 8


def text_key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def bits_of(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, 12 * BITS // 8, dtype=np.uint8).tobytes()


def states_of(number: int) -> torch.Tensor:
    return torch.randn(number % 5 + 1, 4, generator=torch.Generator().manual_seed(number)).bfloat16()


def make_dataset(folder, shards=(3, 2), texts=(4, 3)):
    """A dataset of given samples a shard; clip and text number i have the bytes of bits_of(i) and states_of(i)."""
    (folder / "index").mkdir(parents=True)
    video, text = [], []
    number = 0
    for shard, count in enumerate(texts):
        with write_shard(folder / f"text-{shard:06d}.tar") as writer:
            rows = []
            for i in range(number, number + count):
                rows.append(writer.add_text(text_key_of(i), [7] * len(states_of(i)), states_of(i)))
        write_text_part(part_path(folder, writer.info.name), rows)
        text.append(writer.info)
        number += count
    number = 0
    for shard, count in enumerate(shards):
        rows = []
        with write_shard(folder / f"video-{shard:06d}.tar") as writer:
            for i in range(number, number + count):
                payload = writer.add_video(f"clip{i}", bits_of(i), {"id": i, "shape": THW})
                captions = (Caption("short", {"T2V": TextRef(text_key_of(i), len(states_of(i)))}),)
                rows.append(IndexRow(shard, i, f"clip{i}", payload.offset, payload.length, payload.xxh3, THW, 0.561,
                                     captions, i if i % 2 else None))
        write_video_part(part_path(folder, writer.info.name), rows)
        video.append(writer.info)
        number += count
    names = [shard.name for shard in (*video, *text)]
    info = DatasetInfo(FORMAT_VERSION, "tokenizer", 4, 2, "text", 4, True, TextRef(text_key_of(0), 1), 16.0,
                       sum(shards), sum(shards) * 12, tuple(video), tuple(text), snapshot_of(folder, names))
    write_dataset_info(folder, info)
    return info


@pytest.fixture
def folder(tmp_path):
    make_dataset(tmp_path / "tokens")
    return tmp_path / "tokens"


def flip_byte(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_what_was_written_is_read_back(folder):
    dataset = Dataset.open(folder)
    assert dataset.shard_sizes == [3, 2] and dataset.snapshot == dataset.info.snapshot
    for number in range(5):
        row = dataset.locate(number)
        assert (row.row, row.key, row.shard) == (number, f"clip{number}", int(number >= 3))
        assert row == dataset.rows(row.shard)[number - (0, 3)[row.shard]]
        assert row.thw == THW and row.ratio_key == 0.561 and row.class_id == (number if number % 2 else None)
        assert row.captions == (Caption("short", {"T2V": TextRef(text_key_of(number), len(states_of(number)))}),)
        assert dataset.read_bits(row).tobytes() == bits_of(number)
    for number in range(7):
        assert torch.equal(dataset.read_text(text_key_of(number)), states_of(number))
        assert dataset.text_row(text_key_of(number)).shard == int(number >= 4)
    for row in (-1, 5):
        with pytest.raises(IndexError):
            dataset.locate(row)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    assert make_dataset(tmp_path / "a") == make_dataset(tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 9
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
    assert json.loads(texts[2]["json"]) == {"ids": [7, 7, 7]}


def test_only_the_part_of_a_shard_is_read_and_then_kept(folder):
    dataset = Dataset.open(folder)
    dataset.rows(1)
    part_path(folder, "video-000001.tar").unlink()
    assert len(dataset.rows(1)) == 2
    part_path(folder, "video-000000.tar").unlink()
    with pytest.raises(UserError, match="video-000000.parquet is missing"):
        dataset.rows(0)


def test_several_threads_and_a_pickled_copy_read_the_same(folder):
    # our own bytes, of this process: worker processes receive a dataset this way
    dataset = pickle.loads(pickle.dumps(Dataset.open(folder)))
    with ThreadPoolExecutor(8) as pool:
        states = list(pool.map(lambda i: dataset.read_text(text_key_of(i % 7)), range(200)))
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
    text = dataset.text_row(text_key_of(6))
    flip_byte(folder / "text-000001.tar", text.states_offset)
    with pytest.raises(CorruptSample, match="text-000001.tar"):
        dataset.read_text(text_key_of(6))


def test_a_payload_beyond_the_end_is_a_corrupt_sample(folder):
    dataset = Dataset.open(folder)
    row = dataset.locate(4)
    os.truncate(folder / "video-000001.tar", row.offset + 4)
    with pytest.raises(CorruptSample, match="ends after 4 of its"):
        dataset.read_bits(row)


def test_a_missing_a_truncated_and_a_foreign_dataset_are_refused_by_name(folder, tmp_path):
    with pytest.raises(UserError, match="has no dataset.json"):
        Dataset.open(tmp_path)
    os.truncate(folder / "text-000001.tar", 700)
    with pytest.raises(UserError, match="text-000001.tar has 700 bytes"):
        Dataset.open(folder)
    (folder / "text-000001.tar").unlink()
    with pytest.raises(UserError, match="text-000001.tar is missing"):
        Dataset.open(folder)
    values = json.loads((folder / "dataset.json").read_text())
    for change, message in (({"format_version": 2}, "format version 2"), ({"surplus": 1}, "is not what"),
                            ({"video_shards": [{}]}, "is not what")):
        (folder / "dataset.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            Dataset.open(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Dataset.open(folder)


def test_another_tokenizer_is_refused(folder):
    dataset = Dataset.open(folder)
    dataset.check_tokenizer("tokenizer")
    with pytest.raises(UserError, match="tokenizer.path"):
        dataset.check_tokenizer("other")


def test_an_unknown_text_and_states_that_are_not_cached_are_refused(folder):
    dataset = Dataset.open(folder)
    with pytest.raises(UserError, match="no text entry " + "f" * 64):
        dataset.read_text("f" * 64)
    rows = [replace(dataset.text_row(text_key_of(i)), states_length=0) for i in range(4)]
    write_text_part(part_path(folder, "text-000000.tar"), rows)
    with pytest.raises(UserError, match="only its token ids"):
        Dataset.open(folder).read_text(text_key_of(1))


def test_a_damaged_or_foreign_index_part_is_refused_by_name(folder):
    part = part_path(folder, "video-000000.tar")
    other = part_path(folder, "video-000001.tar").read_bytes()
    flip_byte(part, 40)
    with pytest.raises(UserError, match="video-000000.parquet cannot be read"):
        Dataset.open(folder).rows(0)
    part.write_bytes(other)
    with pytest.raises(UserError, match="has 2 rows, but dataset.json says 3"):
        Dataset.open(folder).rows(0)
    part.write_bytes(part_path(folder, "text-000000.tar").read_bytes())
    with pytest.raises(UserError, match="other columns"):
        Dataset.open(folder).rows(0)


def test_keys_that_webdataset_would_split_and_states_of_another_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dot or slash"), write_shard(tmp_path / "a.tar") as writer:
        writer.add_video("a.b", b"", {})
    with pytest.raises(ValueError, match="already"), write_shard(tmp_path / "a.tar") as writer:
        writer.add_video("a", b"", {})
        writer.add_video("a", b"", {})
    with pytest.raises(ValueError, match="bf16"), write_shard(tmp_path / "a.tar") as writer:
        writer.add_text("a", [1, 2], torch.zeros(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path):
    # The temporary name leads to /dev/full, where every write fails with ENOSPC.
    os.symlink("/dev/full", tmp_path / "video-000000.tar.partial")
    with pytest.raises(UserError, match="video-000000.tar: no space left.*run the same command again") as caught:
        with write_shard(tmp_path / "video-000000.tar") as writer:
            writer.add_video("a", bytes(1 << 20), {})
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_the_same_error(tmp_path):
    program = ("import sys; from grn_scale.data.shards import write_shard\n"
               "with write_shard(sys.argv[1]) as writer:\n"
               "    for i in range(64): writer.add_video(str(i), bytes(1 << 16), {})\n")
    limit = (1 << 20, 1 << 20)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.tar")], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), timeout=120)
    assert done.returncode == 1 and "UserError: cannot write" in done.stderr and "size limit" in done.stderr
    assert list(tmp_path.iterdir()) == []

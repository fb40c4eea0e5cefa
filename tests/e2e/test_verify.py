"""verify on a real dataset, through its command line."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data.dataset_info import read_dataset_info, write_dataset
from grn_scale.data.index_parts import read_video_part, write_video_part
from grn_scale.data.schema import Caption, TextRef
from grn_scale.data_pipeline import verify
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import Storage
from tests.helpers.clips import write_manifest, write_tokenizer
from tests.helpers.token_dataset import write_tokens
from tests.helpers.tokenize_setup import flip_byte


def test_verify_passes_a_sound_dataset_and_decodes_samples(prepared, made, capsys):
    assert verify.main([str(made)]) == 0
    assert "sound: 8 samples in 3 video and 3 text shards" in capsys.readouterr().out
    manifest = write_manifest(prepared.root / "clips.jsonl", prepared.lines)
    settings = prepared.arguments("made")
    assert verify.main([str(made), *settings, "--decode", "3", "--manifest", str(manifest), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] and len(report["decoded"]) == 3
    assert report["means"][-1]["samples"] == 3 and report["means"][-1]["latent_shape"] is None
    for sample in report["decoded"]:
        assert -1 <= sample["ssim"] <= 1
        assert 0 < sample["psnr_db"] < 60 and len(sample["bit_entropy_by_round"]) == 4
        assert all(0 <= entropy <= 1 for entropy in sample["bit_entropy_by_round"])
    assert verify.main([str(made), *settings, "--decode", "1", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["decoded"]
    assert sample["frames"] == 9 and "psnr_db" not in sample


def test_verify_names_a_corrupt_byte(copied, capsys):
    row = Dataset.open(copied).locate(4)
    flip_byte(copied / "video-000001.tar", row.offset + 1)
    assert verify.main([str(copied), "--json"]) == 1
    damage = json.loads(capsys.readouterr().out)["damage"]
    assert {"where": f"video-000001.tar: sample {row.key}", "what": "its bytes do not match their checksum"} in damage
    assert {d["where"].split(":")[0] for d in damage} == {"video-000001.tar"}


def part(folder: Path, family: str, shard: int) -> Path:
    info = read_dataset_info(folder)
    return folder / "index" / (info.video_shards if family == "video" else info.text_shards)[shard].part


def change_summary(folder: Path, number: int, **values) -> None:
    info = read_dataset_info(folder)
    shards = list(info.video_shards)
    shards[number] = replace(shards[number], **values)
    write_dataset(folder, replace(info, video_shards=tuple(shards)))


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: (f / "text-000001.tar").unlink(), "text-000001.tar: cannot be read"),
    (lambda f: os.truncate(f / "video-000000.tar", 2000), "video-000000.tar: has 2000 bytes"),
    (lambda f: shutil.copy(f / "video-000000.tar", f / "video-000001.tar"), "video-000001.tar.*not in the tar"),
    (lambda f: part(f, "video", 2).unlink(), "video-000002-.*parquet is missing"),
    (lambda f: flip_byte(part(f, "text", 0), 60), "text-000000-.*parquet is damaged"),
    (lambda f: shutil.copy(part(f, "video", 1), part(f, "video", 0)), "video-000000-.*parquet is damaged"),
    (lambda f: flip_byte(f / "video-000000.tar", 1), "video-000000.tar: its sha256"),
    (lambda f: change_summary(f, 1, longest=9), "video-000001.tar: the summary says longest 9"),
    (lambda f: change_summary(f, 1, tokens=9), "video-000001.tar: the summary says tokens 9"),
    (lambda f: change_summary(f, 1, samples=2), "video-000001.tar: .* has 3 rows, but the summary says 2"),
])
def test_verify_names_every_kind_of_damage(copied, capsys, damage, culprit):
    damage(copied)
    assert verify.main([str(copied)]) == 1
    assert re.search(f"damaged: .*{culprit}", capsys.readouterr().out)


def test_verify_looks_at_the_files_of_older_snapshots(prepared, copied, capsys):
    lines = [dict(line) for line in prepared.lines]
    lines[0]["caption"] = "another caption"
    old = read_dataset_info(copied)
    prepared.run(str(copied), lines)
    assert verify.main([str(copied)]) == 0
    (copied / "text-000000.tar").unlink()
    capsys.readouterr()
    assert verify.main([str(copied)]) == 1
    assert f"text-000000.tar: it or its part is missing or of another size, and snapshot {old.snapshot[:16]}" in \
        capsys.readouterr().out


def test_a_clip_of_two_chunks_is_counted_and_is_no_damage(prepared, capsys):
    output = prepared.run("repeated", [*prepared.lines[:4], {**prepared.lines[0], "caption": "again"}])
    capsys.readouterr()
    assert verify.main([str(output), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] and report["samples"] == 4 and report["unlisted_samples"] == 1


def test_a_text_that_the_video_index_needs_must_be_there_with_its_length(tmp_path, capsys):
    info = write_tokens(tmp_path, (0,))
    rows = read_video_part(tmp_path, info.video_shards[0], 0, 0)
    (caption,) = rows[0].captions
    changed = [TextRef("absent", 1, "text-000000.tar"), TextRef("text000", 9, "text-000000.tar"),
               TextRef("text000", 1, "text-000009.tar")]
    rows[0] = replace(rows[0], captions=tuple(Caption("", {"T2V": ref}) for ref in changed))
    shard = write_video_part(tmp_path, info.video_shards[0], rows, info.empty_text.tokens)
    write_dataset(tmp_path, replace(info, video_shards=(shard,)))
    assert [damage.what.partition("text-")[2] for damage in verify.find_damage(tmp_path)] == [
        "000000.tar by the video index, is not there", "000000.tar by the video index, has 1 tokens there",
        "000009.tar, which is no shard of the dataset"]


def test_a_dataset_behind_a_url_is_verified_like_a_local_one(tmp_path, capsys):
    url = f"memory://{tmp_path.name}/tokens"
    write_tokens(url, (0, 1))
    assert verify.main([url, "--threads", "2"]) == 0
    storage, row = Storage.of(url), Dataset.open(url).locate(20)
    data = bytearray(storage.read("video-000001.tar"))
    data[row.offset] ^= 1
    storage.write_bytes("video-000001.tar", bytes(data))
    assert {damage.where for damage in verify.find_damage(url)} == {
        "video-000001.tar", f"video-000001.tar: sample {row.key}"}


def test_flipped_clips_and_members_of_tars_are_compared_with_their_source(prepared, capsys):
    import tarfile

    with tarfile.open(prepared.root / "clips/verified.tar", "w") as tar:
        tar.add(prepared.root / "clips/2.mp4", "inside.mp4")
    lines = [{"path": "clips/1.mp4", "caption": "plain"}, {"path": "clips/1.mp4", "caption": "turned", "flip": True},
             {"path": "clips/verified.tar/inside.mp4", "caption": "in a tar"}]
    output = prepared.run("flips", lines)
    manifest = write_manifest(prepared.root / "flips.jsonl", [{"nothing": 1}, {"path": "absent.mp4", "caption": "a"},
                                                              *lines])
    capsys.readouterr()
    assert verify.main([str(output), *prepared.arguments("flips"), "--decode", "9", "--manifest", str(manifest)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("SSIM") == 6 and "mean of 3x2x2, 2 samples" in shown and "mean of all, 3 samples" in shown


def test_verify_with_another_tokenizer_or_manifest_is_refused(prepared, made, tmp_path):
    other = write_tokenizer(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(UserError, match="mean nothing to another"):
        verify.main([str(made), f"tokenizer.path={other}", "--decode", "1"])
    manifest = write_manifest(prepared.root / "short.jsonl", prepared.lines[7:])
    with pytest.raises(UserError, match="no line of .*short.jsonl is sample"):
        verify.main([str(made), *prepared.arguments("made"), "--decode", "1", "--manifest", str(manifest)])
    with pytest.raises(ConfigError, match="add --decode"):
        verify.main([str(made), "--manifest", str(manifest)])
    with pytest.raises(ConfigError, match="no dataset"):
        verify.main([])

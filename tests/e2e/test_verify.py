"""verify on a real dataset, through its command line."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import verify
from grn_scale.errors import ConfigError, UserError
from tests.helpers.clips import write_manifest, write_tokenizer
from tests.helpers.tokenize_setup import content, flip_byte


def test_verify_passes_a_sound_dataset_and_decodes_samples(prepared, made, capsys):
    assert verify.main([str(made)]) == 0
    assert "sound: 8 samples in 3 video and 3 text shards" in capsys.readouterr().out
    manifest = write_manifest(prepared.root / "clips.jsonl", prepared.lines)
    settings = prepared.arguments("made")
    assert verify.main([str(made), *settings, "--decode", "3", "--manifest", str(manifest), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["sound"] and len(report["decoded"]) == 3
    for sample in report["decoded"]:
        assert 0 < sample["psnr_db"] < 60 and len(sample["bit_entropy_by_round"]) == 4
        assert all(0 <= entropy <= 1 for entropy in sample["bit_entropy_by_round"])


def test_verify_names_a_corrupt_byte(copied, capsys):
    row = Dataset.open(copied).locate(4)
    flip_byte(copied / "video-000001.tar", row.offset + 1)
    assert verify.main([str(copied), "--json"]) == 1
    damage = json.loads(capsys.readouterr().out)["damage"]
    assert {"where": f"video-000001.tar: sample {row.key}", "what": "its bytes do not match their checksum"} in damage
    assert {d["where"].split(":")[0] for d in damage} == {"video-000001.tar"}


@pytest.mark.parametrize("damage, culprit", [
    (lambda f: (f / "text-000001.tar").unlink(), "text-000001.tar: cannot be read"),
    (lambda f: os.truncate(f / "video-000000.tar", 2000), "video-000000.tar: has 2000 bytes"),
    (lambda f: shutil.copy(f / "video-000000.tar", f / "video-000001.tar"), "video-000001.tar.*not in the index"),
    (lambda f: (f / "index/video-000002.parquet").unlink(), "video-000002.parquet"),
    (lambda f: flip_byte(f / "index/text-000000.parquet", 60), "text-000000.parquet"),
    (lambda f: shutil.copy(f / "index/video-000001.parquet", f / "index/video-000000.parquet"), "another snapshot"),
    (lambda f: flip_byte(f / "video-000000.tar", 1), "video-000000.tar: its sha256"),
])
def test_verify_names_every_kind_of_damage(copied, capsys, damage, culprit):
    import re

    damage(copied)
    assert verify.main([str(copied)]) == 1
    assert re.search(f"damaged: .*{culprit}", capsys.readouterr().out)


def test_tokenize_mends_what_verify_named_once_the_shard_is_removed(prepared, made, copied):
    (copied / "video-000001.tar").unlink()
    flip_byte(copied / "index/text-000002.parquet", 60)
    flip_byte(copied / "index/video-000000.parquet", 60)
    (copied / "text-000000.tar").unlink()
    prepared.run(str(copied))
    assert content(copied) == content(made)


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

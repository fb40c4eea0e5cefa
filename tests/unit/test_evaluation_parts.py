"""What `grn-scale evaluate` is built of: files read as they are, processes, and the verdict on held-out scores."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodeError
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.clips import ClipSet, read_frames
from grn_scale.evaluation.generation import encode_lossless
from grn_scale.evaluation.held_out import verdict
from grn_scale.evaluation.job import processes
from tests.helpers.clips import write_clip, write_manifest


def test_a_file_is_decoded_no_further_than_its_frames_are_needed(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 32, 3), dtype=np.uint8)
    file = tmp_path / "noise.mkv"
    data = encode_lossless(frames, 12.0)
    file.write_bytes(data)
    assert np.array_equal(read_frames(file), frames)
    assert np.array_equal(read_frames(file, 4), frames[:4]) and len(read_frames(file, 20)) == 9
    damaged = bytearray(data)
    damaged[-2000:] = bytes(2000)  # in the last frame
    file.write_bytes(damaged)
    assert np.array_equal(read_frames(file, 4), frames[:4])
    clips = ClipSet.open(tmp_path, TokenizeConfig())
    assert [len(found) for _, found in clips.decode(clips.clips, 4)] == [4]


def test_frames_a_second_are_those_of_the_clips(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    settings = TokenizeConfig(fps=16.0)
    assert ClipSet.open(tmp_path, settings).fps is None
    (tmp_path / "b.mkv").write_bytes(encode_lossless(np.zeros((5, 16, 16, 3), np.uint8), 12.0))
    assert ClipSet.open(tmp_path, settings).fps == pytest.approx(12)
    (tmp_path / "b.mkv").write_bytes(b"no video")
    clips = ClipSet.open(tmp_path, settings)
    assert clips.fps is None and isinstance(dict(clips.decode(clips.clips))["b.mkv"], DecodeError)
    write_manifest(tmp_path / "clips.jsonl", [{"path": str(write_clip(tmp_path / "c.mp4", 0)), "caption": "c"}])
    assert ClipSet.open(tmp_path / "clips.jsonl", settings).fps == 16


def test_a_process_without_a_gpu_is_told_on_every_process(monkeypatch):
    for name, value in (("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this node has no GPU") as error, processes():
        pass
    assert not isinstance(error.value, ConfigError), "these are told by the first process of a node alone"


@pytest.mark.parametrize(("precision", "largest", "spread", "agree"), [
    ("fp32", 9e-5, 0.2, True), ("fp32", 2e-4, 0.2, False), ("fp32", 2e-4, 3.0, True),
    ("bf16", 0.2, 3.0, True), ("bf16", 0.4, 3.0, False)])
def test_scores_agree_where_they_differ_by_rounding_alone(caplog, precision, largest, spread, agree):
    with caplog.at_level(logging.WARNING):
        found = verdict(5, largest, spread, precision)
    assert found == {"samples": 5, "agree": agree, "largest_score_difference": largest,
                     "score_standard_deviation": spread}
    assert ("computes another model" in caplog.text) is not agree

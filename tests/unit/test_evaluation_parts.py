"""What `grn-scale evaluate` is built of: files read as they are, processes, and the verdict on held-out scores."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from grn_scale.config.data_schema import DataConfig, MixturePart, TokenizeConfig
from grn_scale.config.schema import Config
from grn_scale.data.dataset import Dataset
from grn_scale.data.decode import DecodeError
from grn_scale.data.split import held_out
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.clips import ClipSet, read_frames
from grn_scale.evaluation.generation import encode_lossless
from grn_scale.evaluation.held_out import table, verdict
from grn_scale.evaluation.held_out_datasets import measure_datasets, open_held_out, overall, validation_plan
from grn_scale.evaluation.job import processes
from grn_scale.sampling.source import Source
from tests.helpers.clips import write_clip, write_manifest
from tests.helpers.token_dataset import write_tokens


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


def measured(samples: int, loss: float, bins: list, largest: float, **more) -> dict:
    return {"packs": 1, "samples": samples, "loss": loss, "bit_accuracy": loss / 2, "loss_by_noise": bins,
            "bit_accuracy_by_noise": bins, **more, "training_and_sampling": verdict(samples, largest, 1.0, "fp32")}


def test_datasets_count_with_their_samples_and_differences_are_the_largest():
    whole = overall([measured(1, 0.2, [None, 0.4, 0.1], 1e-6), measured(3, 0.6, [None, None, 0.5], 1e-2)])
    assert whole["loss"] == pytest.approx(0.5) and whole["bit_accuracy"] == pytest.approx(0.25)
    assert whole["loss_by_noise"] == whole["bit_accuracy_by_noise"] == [None, 0.4, pytest.approx(0.4)]
    assert (whole["packs"], whole["samples"]) == (2, 4) and "int8_text_states" not in whole
    assert whole["training_and_sampling"] == {"samples": 4, "agree": False, "largest_score_difference": 1e-2,
                                              "score_standard_deviation": 1.0}
    int8 = [{"int8_text_states": {"relative_l2": change, "largest_score_difference": change}} for change in (0.1, 0.5)]
    whole = overall([measured(1, 0, [], 0, **int8[0]), measured(3, 0, [], 0, **int8[1])])
    assert whole["int8_text_states"] == {"relative_l2": pytest.approx(0.4), "largest_score_difference": 0.5}


def test_a_dataset_of_a_mixture_that_holds_nothing_out_is_named_and_the_others_are_measured(tmp_path, caplog):
    write_tokens(tmp_path / "a", (0, 1))
    write_tokens(tmp_path / "b", (0,), name="other")
    keys = {name: {key.decode() for number in range(Dataset.open(tmp_path / name).info.samples // 16)
                   for key in Dataset.open(tmp_path / name).columns(number).keys} for name in "ab"}
    fraction = next(n / 1000 for n in range(1000) if any(held_out(key, n / 1000) for key in keys["a"] | keys["b"]))
    without = next(name for name in "ab" if not any(held_out(key, fraction) for key in keys[name]))
    parts = tuple(MixturePart(str(tmp_path / name)) for name in "ab")
    config = Config(data=DataConfig(mixture=parts, validation_fraction=fraction, token_budget=128))
    source = Source(tmp_path, {})
    found = measure_datasets(open_held_out(source, config, 1), config, lambda dataset: measured(
        validation_plan(dataset, config).visits_in_epoch(0), 0.5, [0.5], 0))
    assert {part["dataset"]: part["samples"] for part in found["datasets"]}[str(tmp_path / without)] == 0
    assert found["samples"] >= 1 and f"{tmp_path / without} holds no sample out" in caplog.text
    assert any(line == f"  of {tmp_path / without}: holds no sample out" for line in table(found))
    with pytest.raises(ConfigError, match="the validation split has no sample"):
        open_held_out(source, replace(config, data=replace(config.data, validation_fraction=0.0)), 1)

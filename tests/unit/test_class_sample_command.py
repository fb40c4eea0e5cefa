"""grn-scale sample with a class-to-image model: what it writes, what it reads, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.chunks import whole
from grn_scale.class_to_image import ClassAdaptiveConfig, ClassModelConfig, ClassSamplingSettings, generate, load_model
from grn_scale.cli import main
from grn_scale.config import load_config
from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config, ModelConfig, TokenizerConfig, TrainConfig
from grn_scale.model import build_model as build_text_model
from grn_scale.sampling.video import decode_clips
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape
from tests.unit.test_class_model import lively

MODEL = ClassModelConfig(hidden_size=16, num_layers=2, num_heads=2, bottleneck_size=8, in_context_length=2,
                         in_context_start=1, num_classes=5, grid=2, latent_channels=4, rounds=2)
SETTINGS = ClassSamplingSettings(steps=4, guidance=1.5, temperature=1.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Paths of a class run, a text run, converted class weights, the tokenizer, and others."""
    folder = tmp_path_factory.mktemp("parts")
    for name, seed, channels in (("tokenizer", 0, 4), ("other_tokenizer", 1, 4), ("wide_tokenizer", 0, 8)):
        torch.manual_seed(seed)
        save_file(VideoTokenizer(VideoTokenizerShape(4, 4, channels)).state_dict(), folder / f"{name}.safetensors")
    common = {"seed": 3, "tokenizer": TokenizerConfig(str(folder / "tokenizer.safetensors")),
              "train": TrainConfig(precision="fp32")}
    dataset = {"tokenizer_fingerprint": load_tokenizer(common["tokenizer"].path).fingerprint, "fps": 8.0}
    config = ClassConfig(model=MODEL, sampling=SETTINGS, output=str(folder / "run"), **common)
    sections = {name: [whole(key, tensor.detach()) for key, tensor in lively(MODEL, seed).named_parameters()]
                for name, seed in (("model", 1), ("ema", 2))}
    save_checkpoint(folder / "run", 7, sections, {"step": 7, "config": to_dict(config), "dataset": dataset},
                    keep_last=1)
    text = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=32, num_chunks=1, latent_channels=4,
                       rounds=2)
    chunks = [whole(key, tensor.detach()) for key, tensor in build_text_model(text, 1).named_parameters()]
    save_checkpoint(folder / "text_run", 1, {"model": chunks},
                    {"step": 1, "config": to_dict(Config(model=text, **common)), "dataset": dataset}, keep_last=1)
    for weights in ("ema", "raw"):
        assert main(["convert", "--input", str(folder / "run"), "--from", "native", "--to", "hf", "--weights", weights,
                     "--output", str(folder / f"hf_{weights}")]) == 0
    return {path.name.removesuffix(".safetensors"): str(path) for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected_pixels(folder: str, tokenizer: str, classes: list[int], settings: ClassSamplingSettings, seed: int,
                    **load) -> list[np.ndarray]:
    labels = generate(load_model(folder, **load), classes, settings, seed=seed).labels
    return [clip[0] for clip in decode_clips(load_tokenizer(tokenizer), labels.unsqueeze(2), MODEL)]


def test_pictures_strip_and_summary_are_written_and_repeat(parts, tmp_path, capsys):
    arguments = ["sample", "--run", parts["run"], "--class", "2", "--class", "0", "--count", "2", "--json"]
    out = tmp_path / "samples"
    assert main([*arguments, f"output={out}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "samples.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "0000.png", "0001.png", "0002.png", "0003.png", "refinement.png", "samples.json"]
    assert [(entry["class_id"], entry["draw"], entry["steps"]) for entry in printed["samples"]] == [
        (2, 0, 4), (2, 1, 4), (0, 2, 4), (0, 3, 4)]
    assert (printed["step"], printed["weights"], printed["seed"], printed["task"]) == (7, "ema", 3, "C2I")
    assert printed["settings"] == dataclasses.asdict(SETTINGS)
    for n, image in enumerate(expected_pixels(parts["run"], parts["tokenizer"], [2, 2, 0, 0], SETTINGS, 3, ema=True)):
        assert image.shape == (32, 32, 3) and np.array_equal(pixels(out / f"000{n}.png"), image)
    assert Image.open(out / "refinement.png").height > 4 * 96
    assert main([*arguments, f"output={tmp_path / 'again'}"]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_picture_follows_from_seed_and_number_whatever_stands_beside_it(parts, tmp_path):
    common = ["sample", "--run", parts["run"], "--raw", "seed=5", "sampling.adaptive.enabled=true",
              "sampling.adaptive.tmin=3", "sampling.adaptive.wp=1", "sampling.steps=6", "sampling.guidance_low=0"]
    assert main([*common, "--class", "1", "--class", "4", f"output={tmp_path / 'two'}"]) == 0
    assert main([*common, "--class", "1", f"output={tmp_path / 'one'}"]) == 0
    rule = ClassAdaptiveConfig(enabled=True, tmin=3, wp=1)
    settings = dataclasses.replace(SETTINGS, steps=6, guidance_low=0.0, adaptive=rule)
    image = expected_pixels(parts["run"], parts["tokenizer"], [1], settings, 5)[0]
    for name in ("one", "two"):
        assert np.array_equal(pixels(tmp_path / name / "0000.png"), image)
    assert (tmp_path / "one/refinement.png").read_bytes() == (tmp_path / "two/refinement.png").read_bytes()
    assert json.loads((tmp_path / "one/samples.json").read_text())["weights"] == "raw"


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_converted_weights_are_sampled_like_the_run(parts, tmp_path, weights):
    settings = [f"sampling.{name}={getattr(SETTINGS, name)}" for name in ("steps", "guidance", "temperature")]
    assert main(["sample", "--run", parts[f"hf_{weights}"], "--class", "3", f"output={tmp_path / 'hf'}", "seed=3",
                 f"tokenizer.path={parts['tokenizer']}", "train.precision=fp32", *settings]) == 0
    image = expected_pixels(parts["run"], parts["tokenizer"], [3], SETTINGS, 3, ema=weights == "ema")[0]
    assert np.array_equal(pixels(tmp_path / "hf/0000.png"), image)


def test_a_folder_with_both_sets_gives_the_average_unless_raw(parts, tmp_path):
    assert main(["convert", "--input", parts["run"], "--from", "native", "--to", "official", "--output",
                 str(tmp_path / "both.pth")]) == 0
    (tmp_path / "model.yaml").write_text(json.dumps(to_dict(MODEL)))
    assert main(["convert", "--input", str(tmp_path / "both.pth"), "--from", "official", "--to", "native", "--model",
                 str(tmp_path / "model.yaml"), "--output", str(tmp_path / "both")]) == 0
    common = ["sample", "--class", "3", f"tokenizer.path={parts['tokenizer']}", "train.precision=fp32", "seed=3"]
    for flag, name in (((), "ema"), (("--raw",), "raw")):
        for run in (str(tmp_path / "both"), parts[f"hf_{name}"]):
            assert main([*common, "--run", run, *flag, f"output={tmp_path / name / Path(run).name}"]) == 0
        images = [pixels(path) for path in sorted((tmp_path / name).glob("*/0000.png"))]
        assert len(images) == 2 and np.array_equal(*images)
        assert json.loads((tmp_path / name / "both/samples.json").read_text())["weights"] == name


@pytest.mark.parametrize("run,arguments,message,code", [
    ("run", ["--class", "5"], "knows the classes 0 .. 4", 2),
    ("run", ["--class", "-1"], "knows the classes 0 .. 4", 2),
    ("run", [], "no class given: give --class ID (0 .. 4)", 2),
    ("run", ["--class", "1", "--prompt", "a dog", "--frames", "5"], "--prompt, --frames given, but", 2),
    ("run", ["--class", "1", "--count", "0"], "--count is 0", 2),
    ("run", ["--class", "1", "tokenizer.path={other_tokenizer}"], "tokenizer.path has fingerprint", 1),
    ("run", ["--class", "1", "sampling.schedule=square"], "sampling.schedule is 'square'", 2),
    ("run", ["--class", "1", "sampling.tmax=9"], "unknown key sampling.tmax", 2),
    ("hf_ema", ["--class", "1", "tokenizer.path={wide_tokenizer}"], "8 latent channels, but the model has 4", 1),
    ("text_run", ["--class", "1"], "--class given, but", 2),
    ("text_run", ["--prompt", "x", "sampling.guidance_low=0"], "unknown key sampling.guidance_low", 2),
])
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(parts, tmp_path, capsys, run, arguments,
                                                                            message, code):
    filled = [argument.format(**parts) for argument in arguments]
    assert main(["sample", "--run", parts[run], *filled, f"output={tmp_path / 'out'}"]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and not (tmp_path / "out").exists()


def test_overrides_that_both_kinds_of_model_know_apply_to_the_kind_the_run_is_of(parts, tmp_path):
    # For a text model's defaults this would be more steps at least than at most.
    assert main(["sample", "--run", parts["run"], "--class", "1", "sampling.steps=52", "sampling.adaptive.enabled=true",
                 "sampling.adaptive.tmin=51", f"output={tmp_path / 'out'}"]) == 0
    settings = json.loads((tmp_path / "out/samples.json").read_text())["settings"]
    assert (settings["steps"], settings["adaptive"]["tmin"]) == (52, 51)


def test_a_run_file_of_a_class_model_holds_its_sampler():
    config = load_config("configs/runs/class_b.yaml", cls=ClassConfig)
    assert config.sampling == ClassSamplingSettings()
    changed = load_config("configs/runs/class_b.yaml", ["sampling.adaptive.enabled=true"], ClassConfig).sampling
    assert changed.adaptive == ClassAdaptiveConfig(enabled=True) and changed.adaptive.temperature_factor

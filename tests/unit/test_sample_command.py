"""grn-scale sample: what it writes, what it reads from the run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.chunks import whole
from grn_scale.cli import main
from grn_scale.config.load import to_dict
from grn_scale.config.schema import (
    Config,
    ModelConfig,
    SamplingConfig,
    TextConfig,
    TokenizeConfig,
    TokenizerConfig,
    TrainConfig,
)
from grn_scale.demo.text_encoder import HIDDEN_SIZE, build_text_encoder
from grn_scale.model import build_model
from grn_scale.sampling import Condition, SamplingSettings, generate
from grn_scale.sampling.source import open_source
from grn_scale.sampling.video import decode_clips
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import load_text_encoder
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

MODEL = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=32, num_chunks=1, latent_channels=4,
                    rounds=2, text_hidden_size=HIDDEN_SIZE)


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, str]:
    """Paths of a run with checkpoints at steps 1 and 2, its tokenizer, its text encoder, and others of these."""
    folder = tmp_path_factory.mktemp("parts")
    for name, seed in (("tokenizer", 0), ("other_tokenizer", 1)):
        torch.manual_seed(seed)
        save_file(VideoTokenizer(VideoTokenizerShape(4, 4, 4)).state_dict(), folder / f"{name}.safetensors")
    build_text_encoder(["a red circle", "a blue square"], folder / "text", seed=0)
    build_text_encoder(["a red circle", "a blue square"], folder / "other_text", seed=1)
    config = Config(
        output=str(folder / "run"), seed=3, model=MODEL,
        tokenizer=TokenizerConfig(str(folder / "tokenizer.safetensors")),
        text=TextConfig(str(folder / "text"), 16), tokenize=TokenizeConfig(fps=8.0, max_frames=9, latent_side=2),
        train=TrainConfig(precision="fp32"), sampling=SamplingConfig(steps=3, tmax=3, guidance=2.0))
    dataset = {"tokenizer_fingerprint": load_tokenizer(config.tokenizer.path).fingerprint,
               "text_fingerprint": load_text_encoder(config.text.encoder, 16).fingerprint, "fps": 8.0}
    for step in (1, 2):
        sections = {name: [whole(key, tensor.detach()) for key, tensor in build_model(MODEL, seed).named_parameters()]
                    for name, seed in (("model", step), ("ema", 10 + step))}
        save_checkpoint(folder / "run", step, sections, {"step": step, "config": to_dict(config), "dataset": dataset},
                        keep_last=9)
    return {name: str(folder / name) for name in ("run", "text", "other_text", "tokenizer.safetensors",
                                                  "other_tokenizer.safetensors")}


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_videos_strip_and_summary_are_written_from_the_newest_checkpoint(parts, tmp_path, capsys):
    out = tmp_path / "samples"
    arguments = ["sample", "--run", parts["run"], "--prompt", "a red circle", "--prompt", "", "--count", "2", "--json"]
    assert main([*arguments, f"output={out}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "samples.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "0000.mp4", "0001.mp4", "0002.mp4", "0003.mp4", "refinement.png", "samples.json"]
    assert [entry["text"] for entry in printed["samples"]] == ["<T2V>a red circle"] * 2 + [""] * 2
    assert printed["step"] == 2 and printed["weights"] == "ema" and printed["seed"] == 3
    assert printed["settings"]["steps"] == 3 and printed["settings"]["end_fraction"] == 0.95
    assert frames_of(out / "0000.mp4").shape == (9, 32, 32, 3)
    assert Image.open(out / "refinement.png").height > 3 * 96

    assert main([*arguments, f"output={tmp_path / 'again'}"]) == 0
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_samples_are_those_of_generate(parts, tmp_path, capsys):
    out = tmp_path / "samples"
    assert main(["sample", "--run", parts["run"] + "/step-00000001", "--raw", "--prompt", "a blue square",
                 "--frames", "1", f"output={out}", "seed=5"]) == 0
    model = open_source(parts["run"] + "/step-00000001").load(raw=True).model
    text, empty = load_text_encoder(parts["text"], 16).encode(["<T2I>a blue square", ""])
    result = generate(model, [Condition(text, empty, (1, 2, 2), 1.0)], SamplingSettings(3, 3, 2.0), seed=5)
    frames = next(decode_clips(load_tokenizer(parts["tokenizer.safetensors"]), result.labels, MODEL))
    assert np.array_equal(np.asarray(Image.open(out / "0000.png")), frames[0])
    assert f"{out}/0000.png" in capsys.readouterr().out


def test_further_segments_continue_from_the_last_frame(parts, tmp_path, capsys):
    arguments = ["sample", "--run", parts["run"], "--prompt", "a red circle", "--frames", "5"]
    assert main([*arguments, "--segments", "3", f"output={tmp_path / 'long'}"]) == 0
    assert main([*arguments, f"output={tmp_path / 'short'}"]) == 0
    long, short = (frames_of(tmp_path / name / "0000.mp4") for name in ("long", "short"))
    assert len(long) == 5 + 4 + 4 and len(short) == 5
    assert np.abs(long[:5].astype(int) - short.astype(int)).mean() < 2  # H.264 of another length rounds differently
    summary = json.loads((tmp_path / "long/samples.json").read_text())
    assert summary["segments"] == 3 and summary["samples"][0]["steps"] == 9
    assert main(["sample", "--run", parts["run"], "--prompt", "a", "--frames", "1", "--segments", "2",
                 f"output={tmp_path / 'none'}"]) == 2
    assert "--segments is 2, but must be at least 1, and 1 for pictures" in capsys.readouterr().err


def test_a_first_frame_leads_the_clip_and_sets_its_aspect(parts, tmp_path):
    picture = np.full((40, 120, 3), 128, np.uint8)
    picture[:, 60:] = (250, 10, 10)
    Image.fromarray(picture).save(tmp_path / "first.png")
    out = tmp_path / "samples"
    assert main(["sample", "--run", parts["run"], "--prompt", "a red circle",
                 "--first-frame", str(tmp_path / "first.png"), "--frames", "5", f"output={out}"]) == 0
    summary = json.loads((out / "samples.json").read_text())
    assert summary["task"] == "I2V" and summary["samples"][0]["text"] == "<I2V>a red circle"
    assert (summary["height"], summary["width"], summary["ratio_key"]) == (16, 48, 0.333)
    assert frames_of(out / "0000.mp4").shape == (5, 16, 48, 3)


def test_prompts_come_from_a_file_and_the_size_from_the_command_line(parts, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n", encoding="utf-8")
    out = tmp_path / "samples"
    assert main(["sample", "--run", parts["run"], "--prompts", str(tmp_path / "prompts.txt"), "--size", "16x32",
                 "--frames", "5", "--negative", "a blue  square", f"output={out}", "sampling.steps=2"]) == 0
    summary = json.loads((out / "samples.json").read_text())
    assert [entry["prompt"] for entry in summary["samples"]] == ["a red circle", "a blue square"]
    assert (summary["height"], summary["width"], summary["ratio_key"]) == (16, 32, 0.5)
    assert summary["settings"]["steps"] == 2


@pytest.mark.parametrize("arguments,message,code", [
    (["--prompt", "x"], "output is not set", 2),
    (["output={out}"], "no prompt given", 2),
    (["--prompts", "{out}/missing.txt", "output={out}"], "--prompts: cannot read", 2),
    (["--prompt", "x", "--frames", "8", "output={out}"], "5 would do", 2),
    (["--prompt", "x", "--size", "100x32", "output={out}"], "96x32 is near", 2),
    (["--prompt", "x", "--size", "wide", "output={out}"], "like 480x832", 2),
    (["--prompt", "x", "--count", "0", "output={out}"], "--count is 0", 2),
    (["--prompt", "x", "--first-frame", "a.png", "--frames", "1", "output={out}"], "nothing to sample", 2),
    (["--prompt", "x", "--first-frame", "{out}/a.png", "output={out}"], "--first-frame: missing", 1),
    (["--prompt", "x", "tokenizer.path={other_tokenizer.safetensors}", "output={out}"], "tokenizer.path has", 1),
    (["--prompt", "x", "text.encoder={other_text}", "output={out}"], "text.encoder has", 1),
    (["--prompt", "x", "sampling.temperature=0", "output={out}"], "sampling.temperature is 0", 2),
])
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(parts, tmp_path, capsys, arguments,
                                                                            message, code):
    out = tmp_path / "out"
    names = {**parts, "out": str(out)}
    filled = []
    for argument in arguments:
        for name, value in names.items():
            argument = argument.replace("{" + name + "}", value)
        filled.append(argument)
    assert main(["sample", "--run", parts["run"], *filled]) == code
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == "" and not out.exists()


def test_a_folder_that_is_no_run_or_holds_samples_is_refused(parts, tmp_path, capsys):
    assert main(["sample", "--run", str(tmp_path / "none"), "--prompt", "x", f"output={tmp_path}"]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert main(["sample", "--run", str(tmp_path), "--prompt", "x", f"output={tmp_path}"]) == 1
    assert "give a step folder" in capsys.readouterr().err
    (tmp_path / "samples.json").write_text("{}")
    assert main(["sample", "--run", parts["run"], "--prompt", "x", f"output={tmp_path}"]) == 1
    assert "not an empty folder" in capsys.readouterr().err

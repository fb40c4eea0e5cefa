"""`grn-scale demo` from the first clip to the summary: tiny, and (slow) as users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["clips", "text encoder", "manifest", "tokenize", "verify", "reconstruction", "train", "sample videos",
          "continue a picture", "accuracy"]
TINY = ["--clips", "24", "--prompts", "3", "--seeds", "1", "model.hidden_size=32", "model.num_layers=2",
        "model.num_heads=2", "model.ffn_hidden_size=64", "data.token_budget=128",
        "data.validation_fraction=0.2", "train.steps=3",
        "train.validate_every=2", "train.precision=fp32", "schedule.warmup_steps=1", "tokenize.decode_processes=1",
        "sampling.steps=3", "sampling.tmax=3"]


def run_demo(folder, *arguments, timeout=300):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "grn_scale", "demo", "--output", "out", *arguments], cwd=folder,
                          env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder in which a tiny demo has run, its arguments, and what it printed."""
    from safetensors.torch import save_file

    from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

    folder = tmp_path_factory.mktemp("demo")
    save_file(VideoTokenizer(VideoTokenizerShape(8, 8, 16)).state_dict(), folder / "tokenizer.safetensors")
    arguments = [*TINY, "tokenizer.path=tokenizer.safetensors"]
    done = run_demo(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, arguments, done.stdout


def test_demo_ends_with_a_summary_of_everything(tiny):
    folder, _, printed = tiny
    summary = json.loads((folder / "out/summary.json").read_text())
    assert list(summary["stage_seconds"]) == STAGES
    assert all((folder / path).exists() for path in summary["artifacts"].values())
    assert summary["training"]["steps"] == 3 and summary["training"]["loss"] > 0
    for key in ("loss_by_noise", "bit_accuracy_by_noise"):
        assert len(summary["validation"][key]) == len(summary["training"][f"last_50_steps_{key}"]) == 10
    assert summary["reconstruction"]["held_out"]["clips"] == 128 and summary["reconstruction"]["real"]["clips"] == 18
    assert summary["conditional_accuracy"]["clips"] == 3
    for words in ("asked color found", "PSNR", "by noise level", "artifacts"):
        assert words in printed
    assert len(list((folder / "out/samples").glob("*/*.mp4"))) == 4


def test_every_command_is_printed_as_it_can_be_typed(tiny):
    folder, _, printed = tiny
    commands = [line[2:] for line in printed.splitlines() if line.startswith("$ ")]
    assert len(commands) == len(STAGES)
    (manifest,) = [command for command in commands if " manifest validate " in command]
    done = subprocess.run(["bash", "-c", manifest], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "42 clips usable" in done.stdout


def test_second_run_does_only_what_is_new(tiny):
    folder, arguments, _ = tiny
    done = run_demo(folder, *arguments, "--seeds", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    started = [line.split(" -m ")[1].split()[0] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert started == ["grn_scale.demo.accuracy"]
    assert json.loads((folder / "out/summary.json").read_text())["conditional_accuracy"]["clips"] == 6


def test_failing_stage_ends_the_demo_with_its_exit_code(tiny):
    folder, arguments, _ = tiny
    (folder / "out/measured/accuracy.json").unlink()
    (folder / "out/text_encoder/spiece.model").rename(folder / "spiece.model")
    try:
        done = run_demo(folder, *arguments)
    finally:
        (folder / "spiece.model").rename(folder / "out/text_encoder/spiece.model")
    assert done.returncode == 1
    assert "stage 'accuracy' failed with exit code 1" in done.stderr and "-m grn_scale.demo.accuracy" in done.stderr


def test_other_settings_in_a_used_folder_are_refused(tiny):
    folder, arguments, _ = tiny
    done = run_demo(folder, *arguments, "optimizer.lr=0.5")
    assert done.returncode == 2 and "made with other settings (config.optimizer.lr" in done.stderr


@pytest.mark.slow
def test_model_of_the_demo_does_what_captions_ask(tmp_path):
    done = run_demo(tmp_path, timeout=3600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    accuracy = summary["conditional_accuracy"]
    assert (accuracy["clips"], accuracy["prompts"], accuracy["seeds"]) == (512, 128, 4)
    assert accuracy["color"]["accuracy"] >= 0.75 and accuracy["direction"]["accuracy"] >= 0.75
    assert summary["reconstruction"]["held_out"]["psnr_db_mean"] >= 28

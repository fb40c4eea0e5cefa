"""The README's stage commands, as they are written there and in their order, on a few clips of one's own."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.clips import caption, write_clip, write_manifest
from tests.helpers.jobs import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own videos")[2].partition("\n## ")[0]
COMMANDS = [line.strip() for line in SECTION.splitlines() if re.match(r" {4,}(grn-scale|torchrun|python) ", line)]
SMALL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.ffn_hidden_size=64",
         "data.token_budget=256", "data.validation_fraction=0.2", "train.steps=2", "train.validate_every=1"]
"""What makes two steps of training fit a test."""


def launch(line: str, folder: Path) -> str:
    words = shlex.split(line)
    programs = {"grn-scale": ["-m", "grn_scale"], "python": [],
                "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
    command = [sys.executable, *programs[words[0]], *words[1:]]
    if {"train", "plan", "evaluate"} & set(words):
        command += SMALL
    if "sample" in words:
        command += ["sampling.steps=2", "sampling.tmax=2"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, f"$ {line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder in which all commands but the benchmark have run."""
    folder = tmp_path_factory.mktemp("readme")
    write_manifest(folder / "clips.jsonl", [
        {"path": str(write_clip(folder / f"clips/{n}.mp4", n)), "caption": caption(n)} for n in range(40)])
    # The text encoder is made from the captions, which the README tells after the command that reads it.
    first = [line for line in COMMANDS if "demo.prepare" in line]
    for line in [*first, *(line for line in COMMANDS if line not in first and line != "grn-scale bench")]:
        launch(line, folder)
    return folder


def test_the_readme_shows_every_stage():
    words = {word for line in COMMANDS for word in line.split()}
    assert {"manifest", "tokenize", "verify", "plan", "train", "torchrun", "sample", "bench"} <= words


def test_the_commands_leave_what_the_readme_says(finished):
    for path in ("tokens/dataset.json", "tokens/video-000000.tar", "tokens/text-000000.tar", "tokens/quarantine.jsonl",
                 "runs/first/config.yaml", "runs/first/metrics.jsonl", "runs/first/step-00000002/COMPLETE",
                 "runs/first/step-00000002/model", "runs/a/step-00000002/state.json", "samples/samples.json"):
        assert (finished / path).exists(), path
    summary = json.loads((finished / "samples/samples.json").read_text())
    assert all((finished / "samples" / sample["file"]).exists() for sample in summary["samples"])

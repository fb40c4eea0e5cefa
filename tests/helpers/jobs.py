"""Commands run as a user runs them, and a small tokenized dataset to run them on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.clips import caption, write_clip, write_manifest, write_text_encoder, write_tokenizer

MODEL = ["model.hidden_size=32", "model.num_layers=4", "model.num_heads=4", "model.ffn_hidden_size=64",
         "model.text_hidden_size=64", "model.latent_channels=4"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "grn_scale", *arguments]


def grn_scale(*arguments: str, processes: int = 1, expect: int = 0,
              timeout: float = 240) -> subprocess.CompletedProcess:
    """Run `grn-scale ...` to its end; an AssertionError shows its output where the exit code is another."""
    done = subprocess.run(command(*arguments, processes=processes), capture_output=True, text=True, timeout=timeout,
                          env=ENVIRONMENT)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def write_dataset(folder: Path, clips: int = 24) -> Path:
    """Tokenized clips of 9 frames at 32x32 pixels, with the real commands and a random tokenizer."""
    lines = [{"path": str(write_clip(folder / f"clips/{i}.mp4", i)), "caption": caption(i)} for i in range(clips)]
    write_manifest(folder / "clips.jsonl", lines)
    write_tokenizer(folder / "tokenizer.safetensors")
    write_text_encoder(folder / "text", clips)
    grn_scale("tokenize", *MODEL, f"data.manifest={folder}/clips.jsonl", f"output={folder}/tokens", "tokenize.fps=16",
              f"tokenizer.path={folder}/tokenizer.safetensors", f"text.encoder={folder}/text",
              "tokenize.latent_side=2", "tokenize.max_frames=9", "tokenize.shard_samples=8")
    return folder


def train_arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    return ["train", *MODEL, f"data.dataset={dataset}/tokens", f"tokenizer.path={dataset}/tokenizer.safetensors",
            f"output={output}", "data.token_budget=128",
            "data.packs_per_step=2", "data.validation_fraction=0.2", "data.i2v_share=0.3", "data.validation_packs=2",
            "train.steps=8", "train.checkpoint_every=4", "train.validate_every=4", "schedule.warmup_steps=2", *more]

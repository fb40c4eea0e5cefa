"""Tiny training runs on a dataset that is written and not tokenized, for tests of how runs look after themselves."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.token_dataset import CHANNELS, HIDDEN, ROUNDS, write_tokens

MODEL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.ffn_hidden_size=64",
         f"model.text_hidden_size={HIDDEN}", f"model.latent_channels={CHANNELS}", f"model.rounds={ROUNDS}",
         "model.task_tags=false"]


def write_dataset(folder: Path) -> Path:
    """64 clips of up to 60 tokens."""
    from grn_scale.tokenizer import load_tokenizer

    folder.mkdir(parents=True)
    write_tokens(folder, range(4), tokenizer_fingerprint=load_tokenizer("small").fingerprint)
    return folder


def arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    """Of `grn-scale`: 24 steps, a checkpoint every 8."""
    return ["train", *MODEL, f"data.dataset={dataset}", f"output={output}", "data.token_budget=128",
            "data.packs_per_step=2", "train.steps=24", "train.checkpoint_every=8", "train.validate_every=0",
            "schedule.warmup_steps=2", "train.precision=fp32", "data.ledger=true", *more]


def rows(output: Path) -> list[dict]:
    """What metrics.jsonl says of the steps that count, without times."""
    from grn_scale.train.metrics import read_metrics

    return [{key: value for key, value in row.items() if key in ("step", "loss", "gradient_norm", "samples")}
            for row in read_metrics(output / "metrics.jsonl")]


def steps_done(output: Path) -> int:
    """Of a run that may be under way."""
    path = output / "metrics.jsonl"
    return path.read_text().count('"gradient_norm"') if path.exists() else 0

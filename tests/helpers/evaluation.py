"""What `grn-scale evaluate` measures in tests: a small TorchScript network, a run without training, and a command on
every rank."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import torch
from torch import nn

FEATURES, CLASSES = 6, 5


class SmallNetwork(nn.Module):
    """As the field's reference networks: features where they are asked for, class probabilities otherwise."""

    def __init__(self, clips: bool) -> None:
        super().__init__()
        self.clips = clips
        self.features = nn.Linear(24 if clips else 12, FEATURES)
        self.classes = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = x / 64
        if self.clips:
            pooled = nn.functional.adaptive_avg_pool3d(x, [2, 2, 2])
        else:
            pooled = nn.functional.adaptive_avg_pool2d(x, [2, 2])
        features = self.features(pooled.flatten(1))
        return features if return_features else torch.softmax(self.classes(features), 1)


def write_network(path: Path, *, clips: bool = False, seed: int = 0) -> Path:
    """TorchScript file of a `SmallNetwork`."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.manual_seed(seed)
        torch.jit.script(SmallNetwork(clips).eval()).save(str(path))
    return path


NETWORK_OPTIONS = ["--feature-arguments", "return_features=true", "--score-arguments", "", "--score-form",
                   "probabilities", "--splits", "2"]


def write_run(folder: Path) -> Path:
    """folder/run: a checkpoint with random weights that fits folder/tokenizer.safetensors and folder/text."""
    from grn_scale.checkpoint.checkpoint import save_checkpoint
    from grn_scale.checkpoint.chunks import whole
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
    from grn_scale.model import build_model
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.text import load_text_encoder

    model = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=32, num_chunks=1, latent_channels=4,
                        rounds=3, text_hidden_size=64)
    config = Config(output=str(folder / "run"), seed=3, model=model,
                    tokenizer=TokenizerConfig(str(folder / "tokenizer.safetensors")),
                    text=TextConfig(str(folder / "text"), 16),
                    tokenize=TokenizeConfig(fps=16.0, max_frames=5, latent_side=2), train=TrainConfig(precision="fp32"),
                    sampling=SamplingConfig(steps=3, tmax=3, guidance=2.0))
    dataset = {"tokenizer_fingerprint": load_tokenizer(config.tokenizer.path).fingerprint,
               "text_fingerprint": load_text_encoder(config.text.encoder, 16).fingerprint, "fps": 16.0}
    weights = [whole(name, tensor.detach()) for name, tensor in build_model(model, 1).named_parameters()]
    save_checkpoint(folder / "run", 1, {"model": weights},
                    {"step": 1, "config": to_dict(config), "dataset": dataset}, keep_last=1)
    return folder / "run"


def command(argv: list[str]) -> tuple[int, str]:
    """Exit code and stderr of `grn-scale argv...` in this process, with one thread."""
    from grn_scale.cli import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            code = main(argv)
    finally:
        torch.set_num_threads(threads)
    return code, told.getvalue()


def command_without_file(argv: list[str], missing: str) -> tuple[int, str]:
    """`command`; rank 1 gets `missing` for the text encoder."""
    import os

    if os.environ.get("RANK") == "1":
        argv = [f"text.encoder={missing}" if part.startswith("text.encoder=") else part for part in argv]
    return command(argv)

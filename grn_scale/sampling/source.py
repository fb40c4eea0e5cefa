"""A checkpoint to sample from: its model, and whether tokenizer and text encoder are those it was trained with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grn_scale.checkpoint.checkpoint import read_state
from grn_scale.checkpoint.stored import read_small_json
from grn_scale.checkpoint.weights import find_checkpoint
from grn_scale.config.class_schema import ClassConfig, ClassModelConfig
from grn_scale.config.load import apply_overrides, build, load_config
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import GRN, load_model
from grn_scale.sampling.pipeline import GRNPipeline
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import load_text_encoder
from grn_scale.tokenizer.video import VideoTokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A complete checkpoint. Made by `open_source`, which reads its JSON files only."""

    checkpoint: Path
    """The step folder, or a folder of class-to-image weights with their config.json."""
    state: dict[str, Any]
    """What the training saved beside the tensors."""

    @property
    def class_model(self) -> ClassModelConfig | None:
        """The shape of a model that makes images by class; None for one that makes video from text."""
        values = self.state.get("config", {}).get("model", {})
        return build(ClassModelConfig, values, "model.") if "num_classes" in values else None

    @property
    def fps(self) -> float | None:
        """Frames a second of the clips that it was trained on, where the checkpoint says."""
        return self.state.get("dataset", {}).get("fps")

    def run_config(self, overrides: Sequence[str], file: str | None = None) -> Config:
        """The configuration of the run file, without one that which the model was trained with (where to write is not
        taken from it), the overrides on top: a `ClassConfig` for a class-to-image model."""
        schema = Config if self.class_model is None else ClassConfig
        if file is not None:
            return load_config(file, overrides, schema)
        if "config" not in self.state:
            raise ConfigError(f"{self.checkpoint} carries no configuration; give --config FILE")
        values = {**self.state["config"], "output": ""}
        return build(schema, apply_overrides(values, overrides, schema, Path.cwd()))

    def load(self, *, raw: bool) -> TrainedModel:
        """The model of the checkpoint: the moving average of its weights where there is one, unless `raw`."""
        ema = not raw and (self.checkpoint / "ema").is_dir()
        if not ema and not raw:
            log.info("%s keeps no moving average: sampling from the raw weights", self.checkpoint)
        return TrainedModel(self.checkpoint, self.state, load_model(self.checkpoint, ema=ema), "ema" if ema else "raw")

    def check_fingerprint(self, part: str, field: str, fingerprint: str) -> None:
        """UserError unless `part` (tokenizer, text), which the config's `field` names, is the training data's."""
        trained = self.state.get("dataset", {}).get(f"{part}_fingerprint")
        if trained is None:
            log.warning("%s does not say which %s its training data was made with: whether this one fits is unknown",
                        self.checkpoint, field)
        elif trained != fingerprint:
            raise UserError(f"{field} has fingerprint {fingerprint[:16]}, but {self.checkpoint} was trained on data "
                            f"made with {trained[:16]}; give the {field} that its dataset was tokenized with")


@dataclass(frozen=True)
class TrainedModel(Source):
    """A checkpoint with its model."""

    model: GRN
    """fp32 on the CPU."""
    weights: str
    """ema or raw."""


def open_source(path: str | Path) -> Source:
    """The checkpoint of a step folder, or of a run folder (its newest complete one); or the folder itself where it
    holds class-to-image weights as `grn-scale convert` writes them. UserError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--run: there is no folder {path}; give a run folder or one of its step folders")
    if (path / "config.json").is_file():
        described = read_small_json(path / "config.json")
        if described.get("kind") == "class_to_image" and isinstance(described.get("model"), dict):
            return Source(path, {"step": described.get("step"), "config": {"model": described["model"]}})
    checkpoint = find_checkpoint(path)
    return Source(checkpoint, read_state(checkpoint))


def open_tokenizer(source: Source, config: Config, device: torch.device) -> VideoTokenizer:
    """The video tokenizer of tokenizer.path on the device; UserError where it is not the one of the training data."""
    tokenizer = load_tokenizer(config.tokenizer.path).to(device)
    source.check_fingerprint("tokenizer", "tokenizer.path", tokenizer.fingerprint)
    if tokenizer.latent_channels != config.model.latent_channels:
        raise UserError(f"tokenizer.path has {tokenizer.latent_channels} latent channels, but the model has "
                        f"{config.model.latent_channels}: give the tokenizer that it was trained with")
    return tokenizer


def open_pipeline(source: Source, config: Config, *, raw: bool) -> tuple[GRNPipeline, str]:
    """(the model of the source in train.precision with its tokenizer and text encoder, "ema" or "raw").

    On the GPU where there is one. UserError where something cannot be read, or is not what the model was trained with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = open_tokenizer(source, config, device)
    encoder = load_text_encoder(config.text.encoder, config.text.max_tokens, device)
    source.check_fingerprint("text", "text.encoder", encoder.fingerprint)
    trained = source.load(raw=raw)
    model = trained.model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    return GRNPipeline(model, tokenizer, encoder), trained.weights

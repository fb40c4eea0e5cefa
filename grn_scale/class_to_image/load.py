"""Class-to-image models from weights and to files: safetensors with official names, configuration beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import write_json
from grn_scale.checkpoint.checkpoint import read_state
from grn_scale.checkpoint.index import read_json
from grn_scale.checkpoint.tensor_file import Entry, write_tensor_file
from grn_scale.checkpoint.weights import find_checkpoint, load_weights
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.positions import sine_table
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.load import build, to_dict
from grn_scale.errors import ConfigError, UserError

OFFICIAL_PREFIX = "net."
"""In front of every name in official files, whose models are wrapped once more."""
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
RAW_WEIGHTS_FILE = "model_raw.safetensors"
"""Beside WEIGHTS_FILE, which then holds their moving average, in a folder that `grn-scale convert` wrote."""
KIND = "class_to_image"
OFFICIAL_STARTS = {768: 4, 1024: 8, 1280: 10, 1664: 10}
"""Width of an official size (B, L, H, G) -> its in_context_start, which no tensor shows."""


def build_model(config: ClassModelConfig, seed: int = 0) -> ClassGRN:
    """Model with initial weights drawn from the seed, fp32 on the CPU."""
    from grn_scale.class_to_image.initialize import initialize

    model = ClassGRN(config)
    initialize(model, seed)
    return model


def load_model(path: str | Path, config: ClassModelConfig | None = None, *, ema: bool = False) -> ClassGRN:
    """Model in fp32 on the CPU, ready to sample, from a folder with config.json and weights (of `save_model` or in
    Hugging Face style), from a run folder or one of its step folders, or from a safetensors file.

    A file's names may carry the official prefix. Without `config` a folder's own holds, and a file's shapes tell
    (`infer_config`). ema: the moving average of a run's weights. Raises UserError naming each tensor that is missing,
    unexpected or misshapen, ConfigError where the configuration cannot be told.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        config = config or _read_config(path / CONFIG_FILE)
        return with_weights(config, load_weights(path, ema=ema), str(path))
    if path.is_dir():
        config = config or _config_of_run(path)
        return with_weights(config, fixed_tensors(config) | load_weights(path, ema=ema), str(path))
    if not path.is_file():
        raise UserError(f"there is no {path}; give a safetensors file, a run folder, or a folder with {CONFIG_FILE} "
                        f"and {WEIGHTS_FILE}")
    weights = from_official(load_weights(path, ema=ema))
    return with_weights(config or infer_config(weights), weights, str(path))


def save_model(model: ClassGRN, folder: str | Path) -> None:
    """Write config.json and model.safetensors (official names without a prefix, dtypes as they are) into `folder`,
    which is made where it is missing. UserError where the disk refuses."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from error
    state = model.state_dict()
    write_tensor_file(folder / WEIGHTS_FILE, [
        Entry(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in state.items()])
    write_json(folder / CONFIG_FILE, {"kind": KIND, "model": to_dict(model.config)})


def fixed_tensors(config: ClassModelConfig) -> dict[str, torch.Tensor]:
    """What belongs to the state dict and is not trained; a run's checkpoints leave it out."""
    return {"pos_embed": sine_table(config.grid, config.hidden_size)}


def from_official(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of `ClassGRN.state_dict`: without the prefix, where they have it."""
    return {name.removeprefix(OFFICIAL_PREFIX): tensor for name, tensor in weights.items()}


def to_official(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names of official files."""
    return {OFFICIAL_PREFIX + name: tensor for name, tensor in weights.items()}


def with_weights(config: ClassModelConfig, weights: Mapping[str, torch.Tensor], source: str) -> ClassGRN:
    """Model of this configuration with these weights (names without a prefix), in fp32; UserError where they do not
    fit, naming `source` and each tensor."""
    model = ClassGRN(config)
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - wanted.keys()]
    problems += [f"{name} is {list(weights[name].shape)}, not {list(wanted[name].shape)}"
                 for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    problems += [f"{name} is {weights[name].dtype}, not a floating-point tensor"
                 for name in wanted.keys() & weights.keys() if not weights[name].is_floating_point()]
    if problems:
        raise UserError(f"{source} does not fit the class-to-image model: {'; '.join(sorted(problems))}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model.eval()


def infer_config(weights: Mapping[str, torch.Tensor], **known: Any) -> ClassModelConfig:
    """The configuration that the tensors (names without a prefix) belong to; `known` fields are taken as they are.

    Shapes tell all but three things: how input channels split into latent channels, rounds and label form (official
    files have 16 and 4), and `in_context_start` (told by the official widths). ConfigError where these do not
    tell either: then give the fields.
    """
    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights:
            raise ConfigError(f"these tensors do not belong to a class-to-image GRN: there is no {name}")
        found = tuple(weights[name].shape)
        if len(found) != dimensions or 0 in found:
            raise UserError(f"{name} is {list(found)}, but a class-to-image GRN has {dimensions} dimensions there, "
                            "none of them empty")
        return found

    bottleneck, inputs, *_ = shape("x_embedder.proj1.weight", 4)
    _, tokens, hidden = shape("pos_embed", 3)
    posemb = weights.get("in_context_posemb")
    layers = 0
    while f"blocks.{layers}.norm1.weight" in weights:
        layers += 1
    values: dict[str, Any] = {
        "hidden_size": hidden, "num_layers": layers, "num_heads": hidden // shape("blocks.0.attn.q_norm.weight", 1)[0],
        "mlp_ratio": _mlp_ratio(hidden, shape("blocks.0.mlp.w3.weight", 2)[1]), "bottleneck_size": bottleneck,
        "in_context_length": 0 if posemb is None else shape("in_context_posemb", 3)[1],
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1, "grid": round(tokens**0.5),
        "latent_channels": 16, "rounds": 4} | known
    if "in_context_start" not in values:
        if values["in_context_length"] and hidden not in OFFICIAL_STARTS:
            raise ConfigError(f"width {hidden} is none of the official ones, so the tensors do not tell where the "
                              "class tokens come in: give a model configuration with in_context_start")
        values["in_context_start"] = min(OFFICIAL_STARTS.get(hidden, 0), layers - 1)
    forms = (values["label_form"],) if "label_form" in values else ("index", "bit")
    for form in forms:
        config = ClassModelConfig(**values | {"label_form": form})
        if config.label_channels * config.classes == inputs:
            return config
    raise ConfigError(f"x_embedder.proj1.weight takes {inputs} channels, which does not fit latent_channels "
                      f"{values['latent_channels']}, rounds {values['rounds']} and labels in {' or '.join(forms)} "
                      "form: give a model configuration with latent_channels, rounds and label_form")


def _mlp_ratio(hidden: int, ffn: int) -> float:
    """4 where it gives this inner width, else the least ratio that does."""
    least = math.ceil(ffn * 3 / 2) / hidden
    for ratio in (4.0, least, math.nextafter(least, math.inf)):
        if int(int(ratio * hidden) * 2 / 3) == ffn:
            return ratio
    raise ConfigError(f"no mlp_ratio gives an MLP of {ffn} channels at width {hidden}: give a model configuration")


def _read_config(path: Path) -> ClassModelConfig:
    values = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != KIND or not isinstance(values.get("model"), dict):
        raise UserError(f"{path} does not describe a class-to-image model (\"kind\": \"{KIND}\" and a section "
                        "\"model\")")
    return build(ClassModelConfig, values["model"], "model.")


def _config_of_run(path: Path) -> ClassModelConfig:
    checkpoint = find_checkpoint(path)
    values = read_state(checkpoint).get("config", {}).get("model", {})
    if "num_classes" not in values:
        raise UserError(f"{checkpoint} is not of a class-to-image model (its config.model has no num_classes)")
    return build(ClassModelConfig, values, "model.")

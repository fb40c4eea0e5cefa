"""What a file or folder of weights holds, whatever its form, without reading a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grn_scale.checkpoint import layout
from grn_scale.checkpoint.index import read_json
from grn_scale.checkpoint.origin import CLASS_FILES, SECTIONS
from grn_scale.checkpoint.stored import (
    PIPELINE,
    StoredValue,
    StoredWeights,
    read_small_json,
    safetensors_file,
    weights_folder,
)
from grn_scale.checkpoint.weights import find_checkpoint
from grn_scale.class_to_image.load import fixed_tensors
from grn_scale.config.load import build
from grn_scale.convert.kinds import CLASS, CLASS_PREFIX, CONFIG_CLASSES, kind_of, official_names
from grn_scale.convert.native import section_weights
from grn_scale.convert.torch_file import TorchFile, is_torch_file, open_torch_file
from grn_scale.errors import UserError

RAW, EMA, EMA2 = "raw", "ema", "ema2"
"""Sets of weights: as trained (or the only ones there are), their moving average, and a second one."""
OFFICIAL, NATIVE, HF, SAFETENSORS = "official", "native", "hf", "safetensors"
TRAINING_SETS = {RAW: "gpt_fsdp", EMA: "gpt_ema_fsdp"}
CLASS_SETS = {RAW: "model", EMA: "model_ema1", EMA2: "model_ema2"}
TOKENIZER_SETS = {RAW: "vae", EMA: "ema"}


@dataclass(frozen=True)
class Contents:
    """Made by `open_contents`."""

    path: Path
    """The file or folder that was opened: for a run folder its newest checkpoint, for a pipeline its model."""
    form: str
    """official, native, hf, or safetensors: one file with official names, which belongs to none of them alone."""
    kind: str | None
    """text, class, tokenizer, umt5, or None for tensors of no known kind."""
    sets: dict[str, StoredWeights]
    """raw, ema, ema2 -> tensors under official names."""
    step: int | None = None
    config: Any = None
    """The model configuration that travelled with the weights."""


def open_contents(path: str | Path) -> Contents:
    """Contents of a .pth, .ckpt or .safetensors file, a step folder, a run folder or a Hugging Face style folder.

    No tensor is read, except that a native checkpoint's data files are compared with their checksums. UserError where
    it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"there is no file or folder {path}")
    if is_torch_file(path):
        return _open_torch(open_torch_file(path))
    if path.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin"):
        raise UserError(f"{path} is no torch zip file: it is truncated, damaged, or was written by torch before 1.6 "
                        "(then load it with torch and save it again)")
    return _contents(path, SAFETENSORS, {RAW: safetensors_file(path)})


def _contents(path: Path, form: str, sets: dict[str, StoredWeights], **more: Any) -> Contents:
    if not any(len(weights) for weights in sets.values()):
        raise UserError(f"{path} holds no tensor")
    kind = kind_of(name for weights in sets.values() for name in weights)
    return Contents(path, form, kind, {name: official_names(kind, weights) for name, weights in sets.items()}, **more)


def _open_torch(file: TorchFile) -> Contents:
    content = file.content
    if not isinstance(content, Mapping):
        raise UserError(f"{file.path} holds a {type(content).__name__}, not named tensors")
    trainer = content.get("trainer")
    if isinstance(trainer, Mapping):
        step = content.get("g_it")
        return _contents(file.path, OFFICIAL, _sets(file, trainer, TRAINING_SETS, "trainer."), step=_step(step))
    for names in (CLASS_SETS, TOKENIZER_SETS):
        if any(isinstance(content.get(entry), Mapping) for entry in names.values()):
            return _contents(file.path, OFFICIAL, _sets(file, content, names, ""))
    return _contents(file.path, OFFICIAL, {RAW: file.weights(content, "its state dict")})


def _step(value: Any) -> int | None:
    """A training step as a file states it; None for what can be none."""
    return value if type(value) is int and 0 <= value < 10**15 else None


def _sets(file: TorchFile, content: Mapping[str, Any], names: Mapping[str, str],
          prefix: str) -> dict[str, StoredWeights]:
    sets = {}
    for name, entry in names.items():
        if content.get(entry) is not None:
            if not isinstance(content[entry], Mapping):
                raise UserError(f"{file.path}: {prefix}{entry} is a {type(content[entry]).__name__}, not named tensors")
            sets[name] = file.weights(content[entry], prefix + entry)
    if not sets:
        raise UserError(f"{file.path} has none of {', '.join(prefix + entry for entry in names.values())}")
    return sets


def _open_folder(path: Path) -> Contents:
    if (path / PIPELINE).is_file():
        return _open_folder(path / "transformer")
    described = read_small_json(path / "config.json") if (path / "config.json").is_file() else {}
    if described.get("kind") == "class_to_image" and (path / CLASS_FILES[EMA]).is_file():
        sets = {name: safetensors_file(path / file) for name, file in CLASS_FILES.items() if (path / file).is_file()}
        if len(sets) == 1:
            sets = {RAW: sets[EMA]}
        return _with_config(_contents(path, NATIVE, sets), described.get("model"), path / "config.json")
    weights = None if layout.is_step_folder(path) else weights_folder(path)
    if weights is not None:
        opened = _contents(path, HF, {RAW: weights}, step=_step(described.get("step")))
        return _with_config(opened, described.get("model"), path / "config.json")
    checkpoint = find_checkpoint(path)
    sections = {name: section for name, section in SECTIONS.items() if (checkpoint / section).is_dir()}
    if RAW not in sections:
        raise UserError(f"{checkpoint} holds no model weights")
    layout.verify(checkpoint, sections=tuple(sections.values()))
    state = read_json(checkpoint / layout.STATE_NAME)
    config = state.get("config")
    opened = _contents(checkpoint, NATIVE, {name: section_weights(checkpoint / s) for name, s in sections.items()},
                       step=_step(state.get("step")))
    opened = _with_config(opened, config.get("model") if isinstance(config, dict) else None,
                          checkpoint / layout.STATE_NAME)
    if opened.kind == CLASS:
        # A checkpoint keeps what is trained; official files hold the fixed table too.
        table = {CLASS_PREFIX + name: value for name, value in fixed_tensors(opened.config).items()}
        opened = replace(opened, sets={name: StoredWeights({**_stored(table), **weights.values_by_name})
                                       for name, weights in opened.sets.items()})
    return opened


def _stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredValue]:
    return {name: StoredValue(tensor.dtype, tuple(tensor.shape), partial(tensor.clone))
            for name, tensor in tensors.items()}


def _with_config(opened: Contents, values: Any, path: Path) -> Contents:
    """The contents with the model configuration that stands beside the weights, where their kind has one."""
    if opened.kind not in CONFIG_CLASSES:
        return opened
    if not isinstance(values, dict):
        raise UserError(f"{path} carries no model configuration")
    return replace(opened, config=build(CONFIG_CLASSES[opened.kind], values, "model."))

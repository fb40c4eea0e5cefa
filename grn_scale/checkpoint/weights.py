"""Weights by official name out of whatever holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grn_scale.checkpoint import layout
from grn_scale.checkpoint.chunks import whole
from grn_scale.checkpoint.index import ChunkIndex, read_json
from grn_scale.checkpoint.stored import PIPELINE, StoredWeights, read_small_json, weights_folder
from grn_scale.config.schema import ModelConfig
from grn_scale.errors import UserError


def load_weights(path: str | Path, *, ema: bool = False) -> dict[str, torch.Tensor]:
    """Official names -> full tensors on the CPU, in the dtype they were saved in.

    path: a step folder, a run folder (its newest complete checkpoint), a .safetensors file, or a folder of them in
    Hugging Face style (of a pipeline its transformer/). `ema` takes the moving average of the weights. The files of a
    checkpoint are checked against their checksums. UserError where there are none, or they are damaged. In a
    distributed job each rank that calls reads for itself.
    """
    from grn_scale.checkpoint.store import load_chunks_alone  # takes a second to import: not for every command

    path = Path(path)
    single = _hf_folder(path)
    if path.is_file() or single is not None:
        if ema:
            raise UserError(f"{path} holds one set of weights; take the moving average from "
                            "a checkpoint folder, or read this without asking for it")
        if single is not None:
            return dict(single[1])
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path} as safetensors: {error}") from error
    section = "ema" if ema else "model"
    path = find_checkpoint(path)
    if not (path / section).is_dir():
        reason = "the run kept no moving average (optimizer.ema_decay)" if ema else "it is no checkpoint of a model"
        raise UserError(f"{path} holds no {section} weights; {reason}")
    layout.verify(path, sections=(section,))
    index = ChunkIndex.read(path / section)
    tensors = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in index.tensors.items()}
    load_chunks_alone(path / section, [whole(name, tensor) for name, tensor in tensors.items()])
    return tensors


def load_model_config(path: str | Path) -> ModelConfig:
    """The model configuration that the weights of a checkpoint or folder belong to; path as in `load_weights`, but a
    folder.

    UserError where the checkpoint does not carry one, ConfigError where this version does not know a key of it.
    """
    from grn_scale.config.load import build

    if Path(path).is_file():
        raise UserError(f"{path} holds weights, but not the model's configuration; give a checkpoint folder")
    folder = _hf_folder(Path(path))
    if folder is not None:
        path = folder[0] / "config.json"
        values = read_small_json(path).get("model")
    else:
        path = find_checkpoint(Path(path)) / layout.STATE_NAME
        config = read_json(path).get("config")
        values = config.get("model") if isinstance(config, dict) else None
    if not isinstance(values, dict):
        raise UserError(f"{path} carries no model configuration (model)")
    if "num_classes" in values:
        raise UserError(f"{path} is of a class-to-image model, not of a text/video one: load it with "
                        "grn_scale.class_to_image.load_model")
    return build(ModelConfig, values, "model.")


def _hf_folder(path: Path) -> tuple[Path, StoredWeights] | None:
    """The folder with the model's weights, and its tensors; None where `path` is none of Hugging Face style."""
    if not path.is_dir() or layout.is_step_folder(path):
        return None
    if (path / PIPELINE).is_file():
        path = path / "transformer"
    weights = weights_folder(path)
    return None if weights is None else (path, weights)


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a complete step folder, else the newest complete checkpoint inside it; UserError for neither."""
    if layout.is_step_folder(path):
        layout.verify(path, sections=())
        return path
    newest = layout.newest_complete(path, sections=())
    if newest is None:
        raise UserError(f"no weights at {path}: give a step folder, a run folder with a complete checkpoint, "
                        "or a .safetensors file")
    return newest

"""A video tokenizer from safetensors with official key names; every width is read from the tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grn_scale.errors import UserError
from grn_scale.tokenizer.layers import use_channels_last
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

SHIPPED = {"small": Path(__file__).with_name("small.safetensors")}
"""Tokenizers that come with grn_scale, by the name tokenizer.path may give."""


def load_tokenizer(path: str | Path) -> VideoTokenizer:
    """Tokenizer in fp32 on the CPU, ready to encode and decode, with `.fingerprint` set.

    path: a safetensors file, a Hugging Face style folder (of a pipeline its vae/), or "small" for the one that ships.
    UserError where it is missing, damaged, or holds other tensors than a tokenizer does (each named).
    """
    file = SHIPPED.get(str(path), Path(path))
    weights = _folder_weights(file) if file.is_dir() else _file_weights(file)
    tokenizer = VideoTokenizer(infer_shape(weights, str(file)))
    wanted = tokenizer.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - weights.keys()]
    problems += [f"unexpected {name}" for name in weights.keys() - wanted.keys()]
    problems += [f"{name} is {list(weights[name].shape)}, not {list(wanted[name].shape)}"
                 for name in wanted.keys() & weights.keys() if wanted[name].shape != weights[name].shape]
    if problems:
        raise UserError(f"{file} does not hold a video tokenizer: {'; '.join(sorted(problems))}")
    tokenizer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    tokenizer.fingerprint = fingerprint(weights)
    return use_channels_last(tokenizer).eval().requires_grad_(False)


def _file_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"tokenizer.path: cannot read {file} as safetensors: {error}") from error


def _folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    from grn_scale.checkpoint.stored import PIPELINE, weights_folder

    if (folder / PIPELINE).is_file():
        folder = folder / "vae"
    weights = weights_folder(folder)
    if weights is None:
        raise UserError(f"tokenizer.path: {folder} holds no safetensors weights of a video tokenizer; give a "
                        "safetensors file or a Hugging Face style folder")
    return dict(weights)


def fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the weights: what latents depend on."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def infer_shape(weights: Mapping[str, torch.Tensor], name: str) -> VideoTokenizerShape:
    """Widths and strides of the tokenizer that the tensors belong to; UserError where they tell of none."""
    def width(key: str) -> int:
        if key not in weights:
            raise UserError(f"{name} does not hold a video tokenizer: missing {key}")
        if not weights[key].numel():
            raise UserError(f"{name} does not hold a video tokenizer: {key} is {list(weights[key].shape)}")
        return weights[key].shape[0] if weights[key].ndim else 1

    def count(pattern: str) -> int:
        found = 0
        while any(key.startswith(pattern.format(found)) for key in weights):
            found += 1
        return found

    dim = width("encoder.conv1.weight")
    stages = count("encoder.downsamples.{}.")
    blocks = count("encoder.downsamples.0.downsamples.{}.residual.")
    widths = [width(f"encoder.downsamples.{i}.downsamples.0.residual.2.weight") for i in range(stages)]
    multipliers = tuple(w // dim for w in widths)
    time = tuple(f"encoder.downsamples.{i}.downsamples.{blocks}.time_conv.weight" in weights for i in range(stages - 1))
    return VideoTokenizerShape(dim, width("decoder.head.0.gamma") // max(1, multipliers[0]), width("conv2.weight"),
                               multipliers, blocks, time)

"""This project's own forms of weights: a step folder, a safetensors file, and a folder for class-to-image models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import write_json
from grn_scale.checkpoint import layout
from grn_scale.checkpoint.checkpoint import seal
from grn_scale.checkpoint.chunks import narrow
from grn_scale.checkpoint.index import ChunkIndex, StoredChunk, StoredTensor, sync_folder
from grn_scale.checkpoint.origin import CLASS_FILES, SECTIONS
from grn_scale.checkpoint.stored import StoredValue, StoredWeights, safetensors_file
from grn_scale.checkpoint.tensor_file import Entry, write_tensor_file
from grn_scale.errors import UserError

DATA_FILE = "rank-00000.safetensors"


def section_weights(folder: Path) -> StoredWeights:
    """The tensors of one section of a checkpoint, put together from its chunks when they are read."""
    index = ChunkIndex.read(folder)
    files = {name: safetensors_file(folder / name).values_by_name for name in index.files}
    values = {}
    for name, stored in index.tensors.items():
        parts = []
        for chunk in stored.chunks:
            part = files[chunk.file].get(chunk.key)
            if part is None or part.dtype != stored.dtype or part.shape != chunk.size:
                raise UserError(f"{folder / chunk.file} does not hold {chunk.key} as its index says; the checkpoint is "
                                "damaged: take another")
            parts.append((chunk, part))
        if sum(math.prod(chunk.size) for chunk in stored.chunks) != math.prod(stored.shape):
            raise UserError(f"{folder}: the chunks of {name} do not cover it; the checkpoint is damaged: take another")
        values[name] = StoredValue(stored.dtype, stored.shape, partial(_assemble, stored, parts))
    return StoredWeights(values)


def _assemble(stored: StoredTensor, parts: list[tuple[StoredChunk, StoredValue]]) -> torch.Tensor:
    if len(parts) == 1 and parts[0][0].size == stored.shape:
        return parts[0][1].read()
    tensor = torch.empty(stored.shape, dtype=stored.dtype)
    for chunk, part in parts:
        narrow(tensor, chunk.offset, chunk.size).copy_(part.read())
    return tensor


def write_checkpoint(run_folder: Path, step: int, sets: Mapping[str, StoredWeights], state: dict[str, Any]) -> Path:
    """Write the sets as a complete checkpoint of one process, a tensor at a time, and return its step folder."""
    partial_folder = layout.begin(run_folder, step)
    indexes = {}
    for name, weights in sets.items():
        folder = partial_folder / SECTIONS[name]
        folder.mkdir()
        file = write_tensor_file(folder / DATA_FILE, entries(weights))
        indexes[SECTIONS[name]] = ChunkIndex({
            key: StoredTensor(value.dtype, value.shape,
                              (StoredChunk((0,) * len(value.shape), value.shape, DATA_FILE, key),))
            for key, value in weights.values_by_name.items()}, {DATA_FILE: file})
        indexes[SECTIONS[name]].write(folder)
        sync_folder(folder)
    return seal(partial_folder, step, indexes, state, 1)


def write_class_folder(folder: Path, sets: Mapping[str, StoredWeights], config: dict[str, Any], prefix: str) -> None:
    """Write config.json and a file for each set, names without the prefix; a single set is the one to sample with."""
    folder.mkdir()
    if len(sets) == 1:
        sets = {"ema": next(iter(sets.values()))}
    for name, weights in sets.items():
        write_tensor_file(folder / CLASS_FILES[name], entries(StoredWeights(
            {key.removeprefix(prefix): value for key, value in weights.values_by_name.items()})), {"format": "pt"})
    write_json(folder / "config.json", {"kind": "class_to_image", "model": config})


def entries(weights: StoredWeights) -> list[Entry]:
    """What a safetensors file is written from: each tensor is read when its turn comes."""
    return [Entry(name, value.dtype, value.shape, value.read) for name, value in weights.values_by_name.items()]

"""Tensors that stay in their files until each is asked for, so that one is in memory at a time.

Files are read by offset and never mapped: a mapped file of 17 GB would count as memory of the process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grn_scale.checkpoint.tensor_file import SAFETENSORS_NAMES
from grn_scale.errors import UserError

LARGEST_JSON_BYTES = 1 << 24
"""Headers and indexes of the largest models are below 1 MB; a larger one is refused before it is parsed."""
INDEX_SUFFIX = ".safetensors.index.json"
STEMS = ("model", "diffusion_pytorch_model")
"""What transformers and diffusers call the weights of a folder."""
PIPELINE = "model_index.json"
"""Marks a folder that holds the models of a pipeline in folders of their own."""
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class StoredValue:
    """What is known of a tensor without reading it, and how to read it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    """The tensor on the CPU, contiguous, read anew at every call. UserError where the file is damaged."""

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize


class StoredWeights(Mapping[str, torch.Tensor]):
    """Official names -> tensors; a tensor is read when it is asked for, and not kept."""

    def __init__(self, values: Mapping[str, StoredValue]) -> None:
        self.values_by_name = dict(values)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values_by_name[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def __contains__(self, name: object) -> bool:
        return name in self.values_by_name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in self.values_by_name.items()}

    @property
    def bytes(self) -> int:
        return sum(value.bytes for value in self.values_by_name.values())

    @property
    def parameters(self) -> int:
        return sum(value.parameters for value in self.values_by_name.values())


def read_span(path: Path, offset: int, count: int) -> torch.Tensor:
    """uint8 [count]: bytes of a file from `offset` on; UserError where the file ends before."""
    buffer = torch.empty(count, dtype=torch.uint8)
    view = memoryview(buffer.numpy())
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            filled = 0
            while filled < count:
                got = file.readinto(view[filled:])
                if not got:
                    raise UserError(f"{path} is truncated: it ends inside a tensor; get the file again")
                filled += got
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return buffer


def read_small_json(path: Path) -> dict[str, Any]:
    """JSON object of a file of at most 16 MiB; UserError otherwise."""
    try:
        size = path.stat().st_size
        if size > LARGEST_JSON_BYTES:
            raise UserError(f"{path} has {size} bytes; no file of a model's configuration has more than "
                            f"{LARGEST_JSON_BYTES}, so it is not read")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return _json_object(data, str(path))


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in a file, row-major."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    position: int
    """Byte of the file it begins at."""


def safetensors_file(path: Path) -> StoredWeights:
    """The tensors of a safetensors file, none of them read. UserError where the file is damaged or is none."""
    return StoredWeights({name: StoredValue(span.dtype, span.shape, partial(_read, path, span))
                          for name, span in tensor_spans(path).items()})


def tensor_spans(path: Path) -> dict[str, Span]:
    """Where each tensor of a safetensors file lies. UserError where the file is damaged or is none."""
    head, size = _head(path)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(LARGEST_JSON_BYTES, size - 8):
        raise UserError(f"{path} is truncated, or no safetensors file (its header would have {length} bytes)")
    header = _json_object(bytes(read_span(path, 8, length).numpy()), f"the header of {path}")
    found, ranges = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: the header's entry of {name} is malformed ({error!r}); "
                            f"dtypes read are {', '.join(_DTYPES)}") from error
        numbers = (*shape, begin, end)
        if any(type(n) is not int or n < 0 for n in numbers) or end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} is {entry['dtype']} {list(shape)}, but bytes {begin} to {end} do not "
                            "hold that; the file is damaged")
        ranges.append((begin, end))
        found[name] = Span(dtype, shape, 8 + length + begin)
    position = 0
    for begin, end in sorted(ranges):
        if begin != position:
            raise UserError(f"{path}: its tensors overlap or leave a gap at byte {position}; the file is damaged")
        position = end
    if 8 + length + position != size:
        raise UserError(f"{path} has {size} bytes, but its header describes {8 + length + position}: it is truncated "
                        "or damaged; get the file again")
    return found


def weights_folder(folder: Path) -> StoredWeights | None:
    """The tensors of a Hugging Face style folder (sharded with an index, or one file); None where it has none.

    UserError where shards are missing or do not hold what the index says.
    """
    for stem in STEMS:
        index = folder / f"{stem}{INDEX_SUFFIX}"
        if index.is_file():
            return _sharded(index)
        if (folder / f"{stem}.safetensors").is_file():
            return safetensors_file(folder / f"{stem}.safetensors")
    return None


def _sharded(index: Path) -> StoredWeights:
    mapping = read_small_json(index).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise UserError(f"{index} has no weight_map from tensor to file")
    wrong = sorted({file for file in mapping.values() if not _SHARD.fullmatch(file)})
    if wrong:  # a name from the file becomes a path: it must stay inside the folder
        raise UserError(f"{index} names the file {wrong[0]!r}, which is no safetensors file of this folder")
    values, problems = {}, []
    for file in sorted(set(mapping.values())):
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file} is missing, which {index.name} names")
        shard = safetensors_file(index.parent / file).values_by_name
        expected = {name for name, home in mapping.items() if home == file}
        problems += [f"{name} is not in {file}" for name in sorted(expected - shard.keys())]
        problems += [f"{name} is in {file}, but not in the index" for name in sorted(shard.keys() - expected)]
        values.update(shard)
    if problems:
        raise UserError(f"{index} does not fit its shards: {'; '.join(problems)}")
    return StoredWeights(values)


def _read(path: Path, span: Span) -> torch.Tensor:
    return read_span(path, span.position, math.prod(span.shape) * span.dtype.itemsize).view(span.dtype).view(span.shape)


def _head(path: Path) -> tuple[bytes, int]:
    """The first 8 bytes of a file, and its size."""
    try:
        with open(path, "rb") as file:
            return file.read(8), path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise UserError(f"{name} has a key twice; it is damaged")
        return dict(pairs)

    try:
        content = json.loads(data, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} must be a JSON object, but is a {type(content).__name__}")
    return content

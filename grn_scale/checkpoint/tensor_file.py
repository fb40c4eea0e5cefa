"""Streams tensors into one safetensors file, with its checksum, in constant memory.

The safetensors library takes all tensors at once, on the host; a rank's state may be as large as its memory.
Here each tensor comes to the host when its turn comes, and its bytes are hashed on their way to the disk.
Format: 8 bytes little-endian header length, JSON header padded to 8 bytes, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from grn_scale.atomic import atomic_file
from grn_scale.checkpoint.index import StoredFile
from grn_scale.errors import UserError

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL"}
BLOCK = 1 << 24


@dataclass(frozen=True)
class Entry:
    """One tensor of the file; `read` is called when its turn comes and may give any device or strides."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def write_tensor_file(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> StoredFile:
    """Write the entries, widest dtype first so that all are aligned; the file appears complete or not at all.

    metadata: text that the header carries beside the tensors (transformers asks for {"format": "pt"}).
    UserError where the disk refuses (full, quota, permission); the temporary file is then removed.
    """
    entries = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.key))
    header, position = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for entry in entries:
        end = position + math.prod(entry.shape) * entry.dtype.itemsize
        header[entry.key] = {"dtype": SAFETENSORS_NAMES[entry.dtype], "shape": entry.shape,
                             "data_offsets": (position, end)}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    try:
        with atomic_file(path) as file:
            def put(data: bytes | memoryview) -> None:
                for start in range(0, len(data), BLOCK):
                    block = memoryview(data)[start:start + BLOCK]
                    digest.update(block)
                    file.write(block)

            put(len(text).to_bytes(8, "little") + text)
            for entry in entries:
                put(_host_bytes(entry))
            size = file.tell()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or choose another folder, "
                        "the checkpoints already there stay as they are") from error
    return StoredFile(size, digest.hexdigest())


def _host_bytes(entry: Entry) -> memoryview:
    tensor = entry.read().detach()
    if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{entry.key}: announced as {entry.dtype} {entry.shape}, "
                         f"but is {tensor.dtype} {tuple(tensor.shape)}")
    return memoryview(flat_bytes(tensor.to("cpu").contiguous()).numpy())


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes]: the memory of a contiguous tensor. (`view(-1)` can keep an odd stride of a single element.)"""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)

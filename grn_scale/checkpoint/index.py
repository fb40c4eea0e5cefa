"""What a folder of chunks holds, as JSON: tensors, where their boxes lie, and a checksum for every file."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import write_json
from grn_scale.errors import UserError

FORMAT_VERSION = 1
INDEX_NAME = "metadata.json"
FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredChunk:
    """Where one box of a tensor lies."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    key: str
    """Name inside the safetensors file."""


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor; its chunks cover it and do not overlap."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ChunkIndex:
    """metadata.json of a chunk folder."""

    tensors: dict[str, StoredTensor]
    """By official name."""
    files: dict[str, StoredFile]

    @property
    def parameters(self) -> int:
        """Elements in all, each counted once."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    def write(self, folder: Path) -> None:
        """Write metadata.json, atomically; it is what makes the folder readable, so it comes last."""
        write_json(folder / INDEX_NAME, {
            "format_version": FORMAT_VERSION,
            "tensors": {name: {
                "dtype": DTYPE_NAMES[t.dtype], "shape": t.shape,
                "chunks": [{"offset": c.offset, "size": c.size, "file": c.file, "key": c.key} for c in t.chunks],
            } for name, t in sorted(self.tensors.items())},
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in sorted(self.files.items())},
        }, indent=None)

    @classmethod
    def read(cls, folder: Path) -> ChunkIndex:
        """Index of a chunk folder; UserError where it is missing, of another version or malformed."""
        path = folder / INDEX_NAME
        content = read_json(path)
        try:
            require_version(path, content)
            tensors = {name: StoredTensor(DTYPES[t["dtype"]], tuple(t["shape"]), tuple(
                StoredChunk(tuple(c["offset"]), tuple(c["size"]), c["file"], c["key"]) for c in t["chunks"]))
                for name, t in content["tensors"].items()}
            files = {name: StoredFile(f["bytes"], f["sha256"]) for name, f in content["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not have the form of a chunk index ({error!r}); "
                            "the checkpoint is damaged: take another") from error
        # A name from the file becomes a path: it must stay inside the folder.
        for name in {*files, *(c.file for t in tensors.values() for c in t.chunks)}:
            if not FILE_NAME.fullmatch(name) or name not in files:
                raise UserError(f"{path} names the file {name!r}, which is not one of this folder's chunk files; "
                                "the checkpoint is damaged: take another")
        return cls(tensors, files)


def require_version(path: Path, content: dict[str, Any]) -> None:
    """UserError unless the file says the format version that this code reads."""
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(f"{path} has format version {content['format_version']}, this version of grn_scale reads "
                        f"{FORMAT_VERSION}; read it with the version that wrote it")


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; UserError where it cannot be read or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""torch's zip files (.pth, .ckpt): read and written a tensor at a time, and without running what is pickled in them.

Reading: the pickle is looked through first. It may name tensors, containers and argparse.Namespace, and nothing that
would run, or allocate what the file does not hold. Then `torch.load` with `weights_only` onto the meta device rebuilds
names, shapes and strides, and tells where in the file the bytes lie. Records are stored, never compressed, so nothing
larger than the file can come out of it.
"""

from __future__ import annotations

import argparse
import math
import pickletools
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from grn_scale.atomic import atomic_file
from grn_scale.checkpoint.index import DTYPES
from grn_scale.checkpoint.stored import StoredValue, StoredWeights, read_span
from grn_scale.errors import UserError

LARGEST_PICKLE_BYTES = 1 << 24
"""The pickle holds names and shapes only; that of the largest official file is below 1 MB."""
ALIGNMENT = 64
"""torch aligns the bytes of each tensor to this."""
ZIP64_BYTES = 20
"""What the header of a record grows by so that the record may exceed 4 GB."""
LAYOUT_RECORDS = ("/.format_version", "/.storage_alignment")
"""They promise a reader that positions follow from sizes, exactly as torch lays them out; without them it looks."""
BLOCK = 1 << 24
HARMLESS = {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict",
    "argparse Namespace", "torch Size", "torch device", "__builtin__ set", "builtins set", "_codecs encode",
    *(f"torch {kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte",
                                          "Bool")),
    *(f"torch {name}" for name in DTYPES)}
"""Globals that a pickle may name: they build tensors and plain values. torch's own list is longer: some entries of it
allocate as much as the file asks for."""


@dataclass(frozen=True)
class Record:
    """The bytes of one storage."""

    size: int
    crc: int


@dataclass(frozen=True)
class TorchFile:
    """A file that `torch.save` wrote. Made by `open_torch_file`."""

    path: Path
    content: Any
    """What was saved, its tensors on the meta device."""
    records: Mapping[int, Record]
    """By where the bytes of each storage begin."""

    def weights(self, entries: Mapping[Any, Any], what: str) -> StoredWeights:
        """The tensors of one mapping inside `content`; UserError where it holds anything else, or a tensor that
        reaches out of the bytes stored for it."""
        values, problems = {}, []
        for name, tensor in entries.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                problems.append(f"{name!r} is a {type(tensor).__name__}, not a tensor")
            elif tensor.dtype not in DTYPES.values():
                problems.append(f"{name} has dtype {tensor.dtype}; read are {', '.join(DTYPES)}")
            elif not self._fits(tensor):
                problems.append(f"{name} reaches out of the bytes stored for it")
            else:
                values[name] = StoredValue(tensor.dtype, tuple(tensor.shape), partial(self._read, name, tensor))
        if problems:
            raise UserError(f"{self.path}: {what} is damaged: {'; '.join(problems)}")
        return StoredWeights(values)

    def _fits(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        record = self.records.get(storage._checkpoint_offset)
        # More elements than bytes stored is an expanded tensor: no weight is one, and it could be of any size.
        return (record is not None and record.size == storage.nbytes()
                and (tensor.storage_offset() + _extent(tensor)) * tensor.dtype.itemsize <= storage.nbytes()
                and math.prod(tensor.shape) * tensor.dtype.itemsize <= storage.nbytes())

    def _read(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The values of a tensor on the meta device. Where it is all of its record, the checksum must hold."""
        size, begin = tensor.dtype.itemsize, tensor.untyped_storage()._checkpoint_offset
        data = read_span(self.path, begin + tensor.storage_offset() * size, _extent(tensor) * size)
        record = self.records[begin]
        if len(data) == record.size and zlib.crc32(data.numpy()) != record.crc:
            raise UserError(f"{self.path}: the bytes of {name} do not match their checksum: the file is damaged, get "
                            "it again (or it was saved with torch's checksums off: then load and save it with torch)")
        return data.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).contiguous()


def is_torch_file(path: Path) -> bool:
    """Whether a file is a zip archive, as torch writes it."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def open_torch_file(path: Path) -> TorchFile:
    """Names, shapes and nesting of a .pth or .ckpt; no tensor is read.

    UserError where the file is damaged, compressed, or pickles more than tensors and plain values: then nothing of it
    was run.
    """
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            records = _check_archive(path, archive, file)
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, RuntimeError) as error:  # encrypted, unknown codec
        raise UserError(f"{path} is truncated or damaged: {error}; get the file again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # a malformed pickle makes the loader stumble in any way; all of them mean the same
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a torch file: {reason}; get the file again") from error
    return TorchFile(path, content, records)


def _check_archive(path: Path, archive: zipfile.ZipFile, file: BinaryIO) -> dict[int, Record]:
    """The records that hold tensors, by position. UserError for what no torch file has."""
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]  # torch's reader does not tell cases apart
    pickles = [entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(set(names)) != len(names) or len({name.split("/")[0] for name in names}) != 1 or len(pickles) != 1:
        raise UserError(f"{path} is a zip archive, but not one that torch.save writes")
    packed = [entry.filename for entry in entries
              if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size]
    if packed:
        raise UserError(f"{path}: {packed[0]} is compressed, which torch.save never does; refused, because it could "
                        "unpack to any size")
    root = pickles[0].filename.removesuffix("data.pkl")
    if pickles[0].file_size > LARGEST_PICKLE_BYTES:
        raise UserError(f"{path}: its pickle has {pickles[0].file_size} bytes, but only names and shapes belong there "
                        f"(at most {LARGEST_PICKLE_BYTES})")
    order = [entry for entry in entries if entry.filename == f"{root}byteorder"]
    if order and (order[0].file_size > 16 or archive.read(order[0]) != b"little"):
        raise UserError(f"{path} was written on a big-endian machine; save it again on a little-endian one")
    _check_pickle(path, archive.read(pickles[0]))
    records = {}
    for entry in entries:
        if entry.filename.startswith(f"{root}data/"):
            file.seek(entry.header_offset)
            header = file.read(30)
            start = (entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
                     + int.from_bytes(header[28:30], "little"))
            records[start] = Record(entry.file_size, entry.CRC)
    return records


def _check_pickle(path: Path, data: bytes) -> None:
    """UserError unless all that the pickle could call is harmless."""
    found = {str(argument) if code.name == "GLOBAL" else code.name for code, argument, _ in pickletools.genops(data)
             if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4")}
    foreign = sorted(found - HARMLESS)
    if foreign:
        names = ", ".join(name.replace(" ", ".") for name in foreign[:5])
        raise UserError(f"{path} pickles {names}, which could run code; nothing of the file was loaded. Only tensors, "
                        "plain values and argparse.Namespace are read: save the state dict alone")


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last one of a strided tensor, both counted."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))


def write_torch_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write nested mappings with StoredValue leaves (and plain values) as `torch.save` would write the tensors.

    One tensor is in memory at a time. A StoredValue that stands there twice is stored once. The file appears complete
    or not at all.
    """
    values: list[StoredValue] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name + ".partial.") as folder:
        skeleton = _write_skeleton(Path(folder) / "archive", content, values)
        with zipfile.ZipFile(skeleton) as source, atomic_file(path) as file, \
                zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as target:
            for entry in source.infolist():
                _, _, key = entry.filename.partition("/data/")
                if entry.filename.endswith(LAYOUT_RECORDS):
                    continue
                if key:
                    _write_record(target, file, entry.filename, _bytes(values[int(key)]))
                else:
                    _write_record(target, file, entry.filename, memoryview(source.read(entry)))


def _write_skeleton(path: Path, content: Mapping[str, Any], values: list[StoredValue]) -> Path:
    """The archive as torch writes it, with holes in place of the tensors' bytes; `values` gets them in record order."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fakes: dict[int, torch.Tensor] = {}

    def build(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: build(inner) for name, inner in node.items()}
        if not isinstance(node, StoredValue):
            return node
        if id(node) not in fakes:
            fakes[id(node)] = torch.empty(node.shape, dtype=node.dtype)
            values.append(node)
        return fakes[id(node)]

    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(build(content), path)
    return path


def _write_record(target: zipfile.ZipFile, file: BinaryIO, name: str, data: memoryview) -> None:
    entry = zipfile.ZipInfo(name)
    start = file.tell() + 30 + len(name.encode()) + ZIP64_BYTES + 4
    padding = -start % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with target.open(entry, "w", force_zip64=True) as record:
        for begin in range(0, len(data), BLOCK):
            record.write(data[begin:begin + BLOCK])


def _bytes(value: StoredValue) -> memoryview:
    return memoryview(value.read().reshape(-1).view(torch.uint8).numpy())

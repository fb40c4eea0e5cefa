"""Token shards: tars that are written once, whole and reproducibly, and read by byte offset.

The format is described in schema.py. A tar holds uncompressed members with fixed headers, so the same samples
give the same bytes, plain webdataset can stream it, and a sample is one pread at the offset the index gives.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import torch
import xxhash

from grn_scale.atomic import atomic_file, write_json
from grn_scale.data.index_parts import TEXT_SCHEMA, Payload, part_path, read_table, read_video_part
from grn_scale.data.schema import FORMAT_VERSION, DatasetInfo, IndexRow, ShardInfo, TextRef, TextRow
from grn_scale.errors import UserError

DATASET_FILE = "dataset.json"
BLOCK = 512
"""Tar headers and payloads start at multiples of this."""
CACHED_PARTS = 64
CACHED_TEXT_BYTES = 256 * 2**20
"""For texts of 512 tokens; shorter ones take less."""
OPEN_FILES = 64

K = TypeVar("K")
T = TypeVar("T")


class CorruptSample(UserError):
    """A payload that does not match its checksum, or ends early. `shard` is the tar's name."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(f"{shard}: sample {key} is damaged: {reason}; `grn-scale verify` lists all damage")
        self.shard, self.key, self.reason = shard, key, reason


class ShardWriter:
    """Members of one tar. Made by `write_shard`; `info` is complete when its block has ended."""

    def __init__(self, name: str, stream: BinaryIO):
        self.info = ShardInfo(name, 0, 0, "")
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._keys: set[str] = set()

    def add_video(self, key: str, bits: bytes, about: dict[str, Any]) -> Payload:
        """Append a clip: <key>.bits, then <key>.json with `about` and the checksums of the bits."""
        self._begin(key)
        digest = xxhash.xxh3_64_intdigest(bits)
        offset = self._member(f"{key}.bits", bits)
        self._member(f"{key}.json", _json_bytes(
            {**about, "xxh3": f"{digest:016x}", "sha256": hashlib.sha256(bits).hexdigest()}))
        return Payload(offset, len(bits), digest)

    def add_text(self, key: str, ids: Sequence[int], states: torch.Tensor) -> TextRow:
        """Append a caption: <key>.json with its token ids, then <key>.states (bf16 [n, hidden], little endian).

        The row's `shard` is 0: where the tar stands in the dataset is for dataset.json to say.
        """
        self._begin(key)
        tokens = len(ids)
        if states.dtype != torch.bfloat16 or states.shape[0] != tokens:
            raise ValueError(f"states are {states.dtype} {tuple(states.shape)}, but must be bf16 [{tokens}, hidden]")
        written = _json_bytes({"ids": list(ids)})
        payload = states.contiguous().view(torch.uint8).numpy().tobytes()
        ids_offset = self._member(f"{key}.json", written)
        states_offset = self._member(f"{key}.states", payload)
        return TextRow(0, key, tokens, ids_offset, len(written), states_offset, len(payload),
                       xxhash.xxh3_64_intdigest(payload))

    def _begin(self, key: str) -> None:
        if "." in key or "/" in key or key in self._keys:
            raise ValueError(f"key {key!r} holds a dot or slash, or is in the shard already")
        self._keys.add(key)

    def _member(self, name: str, payload: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(payload), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(payload)
        self._write(bytes(-len(payload) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self._position += len(data)

    def _finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self.info = ShardInfo(self.info.name, len(self._keys), self._position, self._sha256.hexdigest())


@contextmanager
def write_shard(path: str | Path) -> Iterator[ShardWriter]:
    """Writer of the tar `path`, which appears when the block ends and not at all after an error.

    Raises UserError where the disk is full.
    """
    path = Path(path)
    with atomic_file(path) as stream:
        writer = ShardWriter(path.name, stream)
        yield writer
        writer._finish()


def write_dataset_info(folder: str | Path, info: DatasetInfo) -> None:
    """Write dataset.json, which makes the folder a dataset: the last step of every change."""
    write_json(Path(folder) / DATASET_FILE, dataclasses.asdict(info))


def read_dataset_info(folder: str | Path) -> DatasetInfo:
    """dataset.json of a folder. UserError where it is missing, of another format version, or incomplete."""
    path = Path(folder) / DATASET_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} is no tokenized dataset: it has no {DATASET_FILE}, which is written last; "
                        "run `grn-scale tokenize` to its end, or correct the path") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, but this release reads version {FORMAT_VERSION}; "
                        "tokenize again with this release, or use the release that wrote it")
    try:
        shards = {name: tuple(ShardInfo(**shard) for shard in values[name]) for name in ("video_shards", "text_shards")}
        return DatasetInfo(**{**values, **shards, "empty_text": TextRef(**values["empty_text"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is not what this release writes: {error}") from error


class Dataset:
    """A tokenized dataset, read only. Bytes are read by offset and checked; several threads may read.

    In memory are small caches, and from the first text on the text index (about 100 bytes an entry).
    """

    def __init__(self, folder: Path, info: DatasetInfo):
        self.folder = folder
        self.info = info
        self._first_rows = [0, *accumulate(shard.samples for shard in info.video_shards)]
        self._parts: _Recent[int, list[IndexRow]] = _Recent(CACHED_PARTS)
        self._texts: _Recent[str, torch.Tensor] = _Recent(
            max(16, CACHED_TEXT_BYTES // (512 * info.text_hidden_size * 2)))
        self._files: _Recent[str, BinaryIO] = _Recent(OPEN_FILES)
        self._text_index: _TextIndex | None = None
        self._text_index_lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """The dataset in `folder`, after a look at every shard's size.

        Raises UserError: no dataset.json, another format version, a shard missing or of another size (named).
        """
        folder = Path(folder)
        info = read_dataset_info(folder)
        for shard in (*info.video_shards, *info.text_shards):
            path = folder / shard.name
            try:
                size = path.stat().st_size
            except FileNotFoundError as error:
                raise UserError(f"shard {path} is missing; copy it again, or tokenize again, which makes only what "
                                "is missing") from error
            if size != shard.bytes:
                raise UserError(f"shard {path} has {size} bytes, but dataset.json says {shard.bytes}: it is truncated "
                                "or was replaced; copy it again, or tokenize again")
        return cls(folder, info)

    def __reduce__(self) -> tuple:
        # Worker processes open files of their own.
        return Dataset, (self.folder, self.info)

    @property
    def snapshot(self) -> str:
        """Name of this state of the index."""
        return self.info.snapshot

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each video shard."""
        return [shard.samples for shard in self.info.video_shards]

    def check_tokenizer(self, fingerprint: str) -> None:
        """UserError unless the shards were made by the tokenizer with this fingerprint."""
        if fingerprint != self.info.tokenizer_fingerprint:
            raise UserError(f"{self.folder} was made by the tokenizer {self.info.tokenizer_fingerprint[:16]}..., but "
                            f"tokenizer.path gives {fingerprint[:16]}...; its bits mean nothing to another one: set "
                            "tokenizer.path to the file the dataset was made with, or tokenize again")

    def rows(self, shard: int) -> list[IndexRow]:
        """Index rows of a video shard, in the order of its tar. Reads that part of the index only."""
        return self._parts.get(shard, self._read_part)

    def locate(self, row: int) -> IndexRow:
        """Index row number `row` of the dataset. IndexError where there is none."""
        if not 0 <= row < self._first_rows[-1]:
            raise IndexError(f"row {row} of {self._first_rows[-1]}")
        shard = bisect.bisect_right(self._first_rows, row) - 1
        return self.rows(shard)[row - self._first_rows[shard]]

    def read_bits(self, row: IndexRow) -> np.ndarray:
        """uint8 [row.length]: np.packbits of the bits [t, h, w, D] of a clip, writable.

        Raises CorruptSample where the bytes are not those of the index, OSError where they cannot be read.
        """
        shard = self.info.video_shards[row.shard].name
        return self._read(shard, row.key, row.offset, row.length, row.xxh3)

    def text_row(self, key: str) -> TextRow:
        """Index row of a text entry. UserError where the dataset has no entry of this key."""
        with self._text_index_lock:
            if self._text_index is None:
                self._text_index = _TextIndex(self.folder, [shard.name for shard in self.info.text_shards])
        return self._text_index.find(key)

    def read_text(self, key: str) -> torch.Tensor:
        """bf16 [n, text_hidden_size]: states of a text entry, shared with later calls: do not write to it.

        Raises UserError for an unknown key or where the states are not cached, CorruptSample, OSError.
        """
        return self._texts.get(key, self._read_states)

    def _read_part(self, shard: int) -> list[IndexRow]:
        name, samples = self.info.video_shards[shard].name, self.info.video_shards[shard].samples
        rows = read_video_part(part_path(self.folder, name), shard, self._first_rows[shard])
        if len(rows) != samples:
            raise UserError(f"index part of {name} has {len(rows)} rows, but dataset.json says {samples} samples; "
                            "tokenize again, which keeps all finished shards")
        return rows

    def _read_states(self, key: str) -> torch.Tensor:
        row = self.text_row(key)
        if row.states_length == 0:
            raise UserError(f"{self.folder} holds no states of text {key}, only its token ids; tokenize again with the "
                            "text encoder")
        shard = self.info.text_shards[row.shard].name
        data = self._read(shard, key, row.states_offset, row.states_length, row.xxh3)
        return torch.from_numpy(data).view(torch.bfloat16).reshape(row.tokens, self.info.text_hidden_size)

    def _read(self, shard: str, key: str, offset: int, length: int, xxh3: int) -> np.ndarray:
        data = np.empty(length, np.uint8)
        file = self._files.get(shard, lambda name: open(self.folder / name, "rb", buffering=0))
        read = 0
        while read < length:
            count = os.preadv(file.fileno(), [memoryview(data)[read:]], offset + read)
            if count == 0:
                raise CorruptSample(shard, key, f"the file ends after {read} of its {length} bytes")
            read += count
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise CorruptSample(shard, key, "its bytes do not match their checksum")
        return data


class _TextIndex:
    """Where each text entry lies: keys sorted in one array, found by bisection."""

    def __init__(self, folder: Path, shards: Sequence[str]):
        tables = [read_table(part_path(folder, shard), TEXT_SCHEMA) for shard in shards]
        self._tables = tables
        self._first = np.cumsum([0, *(table.num_rows for table in tables)])
        keys = np.array([key for table in tables for key in table["key"].to_pylist()], dtype="S64")
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._folder = folder

    def find(self, key: str) -> TextRow:
        at = int(np.searchsorted(self._keys, key.encode()))
        if at == len(self._keys) or self._keys[at] != key.encode():
            raise UserError(f"{self._folder} has no text entry {key}: the index and the text shards do not belong "
                            "together; tokenize again, which makes only what is missing")
        row = int(self._order[at])
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        values = self._tables[shard].slice(row - int(self._first[shard]), 1).to_pylist()[0]
        return TextRow(shard=shard, **values)


class _Recent(Generic[K, T]):
    """The last `size` values used; several threads may ask."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[K, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[K], T]) -> T:
        """Value of `key`, made by `make(key)` where it is not at hand. Two threads may both make it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make(key)
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

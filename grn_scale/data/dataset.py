"""A tokenized dataset as it is read: index rows and columns, and payloads by offset, checked at every read."""

from __future__ import annotations

import bisect
import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash

from grn_scale.data.block_cache import Blocks
from grn_scale.data.columns import ShardColumns, shard_columns
from grn_scale.data.dataset_info import read_dataset_info
from grn_scale.data.index_parts import (
    INDEX_FOLDER,
    REMEDY,
    TEXT_SCHEMA,
    VIDEO_SCHEMA,
    DamagedPart,
    VideoPart,
    part_table,
    read_table,
)
from grn_scale.data.payloads import open_payloads
from grn_scale.data.recent import Recent
from grn_scale.data.schema import DatasetInfo, IndexRow, ShardInfo, TextRef, TextRow
from grn_scale.data.text_payload import unpack_states
from grn_scale.errors import DoNotRequeue, UserError
from grn_scale.storage import Storage

CACHED_PARTS = 64
CACHED_TEXT_BYTES = 256 * 2**20
"""For texts of 512 tokens; shorter ones take less."""


class CorruptSample(UserError):
    """A payload that does not match its checksum, or ends early, or a text whose index part is damaged. `shard` is the
    tar's name."""

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(f"{shard}: sample {key} is damaged: {reason}; `grn-scale verify` lists all damage")
        self.shard, self.key, self.reason = shard, key, reason


class Dataset:
    """A tokenized dataset, read only. Bytes are read by offset and checked; several threads may read.

    In memory are small caches of index parts and texts, whatever the size of the dataset.

    Rows and columns need the index parts of video shards, without which nothing can be planned: they raise
    DoNotRequeue where such a part is damaged at two reads, and UserError where it is missing or cannot be read after
    several attempts. The part of a text shard is read like the texts themselves: it costs samples, not the run.
    """

    def __init__(self, storage: Storage, info: DatasetInfo, cache: Blocks | None = None):
        self.storage = storage
        self._cache = cache
        self._payloads = open_payloads(storage, cache)
        self.info = info
        self._first_rows = [0, *accumulate(shard.samples for shard in info.video_shards)]
        self._text_shards = {shard.name: shard for shard in info.text_shards}
        self._parts: Recent[int, VideoPart] = Recent(CACHED_PARTS)
        self._text_parts: Recent[str, _TextPart] = Recent(CACHED_PARTS)
        self._texts: Recent[TextRef, torch.Tensor] = Recent(
            max(16, CACHED_TEXT_BYTES // (512 * info.text_hidden_size * 2)))

    @classmethod
    def open(cls, folder: str | Path, snapshot: str = "", check_files: bool = True,
             cache: Blocks | None = None) -> Dataset:
        """The dataset in `folder` (a path or URL): its newest state, or the snapshot that is named.

        check_files: look whether every shard is there, of its size, and has its part, which takes two listings; one
        process of a run does it. cache: keeps blocks of a remote dataset (see `DiskBlocks.of`).

        Raises UserError: no dataset, another format version, no such snapshot, a shard missing or of another size
        (named).
        """
        storage = Storage.of(folder)
        info = read_dataset_info(storage, snapshot)
        if check_files:
            _check_files(storage, info)
        return cls(storage, info, cache)

    def __reduce__(self) -> tuple:
        # Worker processes open files of their own.
        return type(self), (self.storage, self.info, self._cache)

    @property
    def snapshot(self) -> str:
        """Name of this state of the dataset."""
        return self.info.snapshot

    @property
    def shard_sizes(self) -> list[int]:
        """Samples of each video shard."""
        return [shard.samples for shard in self.info.video_shards]

    def check_tokenizer(self, fingerprint: str) -> None:
        """UserError unless the shards were made by the tokenizer with this fingerprint."""
        if fingerprint != self.info.tokenizer_fingerprint:
            raise UserError(f"{self.storage.location} was made by the tokenizer "
                            f"{self.info.tokenizer_fingerprint[:16]}..., but tokenizer.path gives "
                            f"{fingerprint[:16]}...; its bits mean nothing to another one: set tokenizer.path to the "
                            "file the dataset was made with, or tokenize again")

    def rows(self, shard: int) -> list[IndexRow]:
        """Index rows of a video shard, in the order of its tar. Reads that part of the index only."""
        return self._part(shard).rows()

    def locate(self, row: int) -> IndexRow:
        """Index row number `row` of the dataset. IndexError where there is none."""
        if not 0 <= row < self._first_rows[-1]:
            raise IndexError(f"row {row} of {self._first_rows[-1]}")
        shard = bisect.bisect_right(self._first_rows, row) - 1
        return self._part(shard).row(row - self._first_rows[shard])

    def columns(self, shard: int) -> ShardColumns:
        """Columns of a video shard as arrays, in the order of its tar. Not kept: read once for each window."""
        return shard_columns(self._part(shard).table)

    def read_bits(self, row: IndexRow) -> np.ndarray:
        """uint8 [row.length]: np.packbits of the bits [t, h, w, D] of a clip, writable.

        Raises CorruptSample where the bytes are not those of the index, OSError where they cannot be read.
        """
        return self._read(self.info.video_shards[row.shard], row.key, row.offset, row.length, row.xxh3)

    def text_row(self, ref: TextRef) -> TextRow:
        """Index row of a text entry. UserError where the dataset has no such entry, CorruptSample where its index part
        is damaged, OSError where that cannot be read."""
        try:
            part = self._text_parts.get(self._text_shard(ref).name, self._read_text_part)
        except DamagedPart as error:
            raise CorruptSample(ref.shard, ref.key, str(error)) from error
        return part.find(ref.key)

    def read_text(self, ref: TextRef) -> torch.Tensor:
        """bf16 [n, text_hidden_size]: states of a text entry, shared with later calls: do not write to it.

        Raises UserError for an unknown entry or where the states are not cached, CorruptSample, OSError.
        """
        return self._texts.get(ref, self._read_states)

    def read_text_ids(self, ref: TextRef) -> list[int]:
        """Token ids of a text entry. Raises UserError for an unknown entry, CorruptSample, OSError."""
        row = self.text_row(ref)
        data = self._read(self._text_shard(ref), ref.key, row.ids_offset, row.ids_length, row.ids_xxh3)
        return json.loads(data.tobytes())["ids"]

    def _part(self, shard: int) -> VideoPart:
        return self._parts.get(shard, self._read_video_part)

    def _read_video_part(self, number: int) -> VideoPart:
        try:
            table = read_table(self.storage, self.info.video_shards[number], VIDEO_SCHEMA)
        except DamagedPart as error:
            raise DoNotRequeue(str(error)) from error
        return VideoPart(table, number, self._first_rows[number])

    def _text_shard(self, ref: TextRef) -> ShardInfo:
        if ref.shard not in self._text_shards:
            raise UserError(f"{self.storage.location} has no text shard {ref.shard!r}: index and text shards do not "
                            "belong together; tokenize again, which makes only what is missing")
        return self._text_shards[ref.shard]

    def _read_text_part(self, name: str) -> _TextPart:
        table = part_table(self.storage, self._text_shards[name], TEXT_SCHEMA)
        return _TextPart(table, f"{self.storage.location}: {name}")

    def _read_states(self, ref: TextRef) -> torch.Tensor:
        row = self.text_row(ref)
        if row.states_length == 0:
            raise UserError(f"{self.storage.location} holds no states of text {ref.key}, only its token ids; tokenize "
                            "again with text.states=bf16, or let training run the text encoder")
        data = self._read(self._text_shard(ref), ref.key, row.states_offset, row.states_length, row.states_xxh3)
        try:
            return unpack_states(data, row.tokens, self.info.text_hidden_size, self.info.text_states)
        except ValueError as error:
            raise CorruptSample(ref.shard, ref.key, str(error)) from error

    def _read(self, shard: ShardInfo, key: str, offset: int, length: int, xxh3: int) -> np.ndarray:
        data = self._payloads.read(shard, offset, length)
        if xxhash.xxh3_64_intdigest(data) == xxh3:
            return data
        if self._payloads.forget(shard, offset, length):
            # What was kept of the shard may be damaged, and the shard itself be sound.
            data = self._payloads.read(shard, offset, length)
            if xxhash.xxh3_64_intdigest(data) == xxh3:
                return data
        raise CorruptSample(shard.name, key, "its bytes do not match their checksum" if len(data) == length else
                            f"the file ends after {len(data)} of its {length} bytes")


def _check_files(storage: Storage, info: DatasetInfo) -> None:
    sizes, parts = storage.sizes(), set(storage.names(INDEX_FOLDER))
    for shard in (*info.video_shards, *info.text_shards):
        if shard.name not in sizes:
            raise UserError(f"shard {storage / shard.name} is missing; copy it again, or tokenize again, which makes "
                            "only what is missing")
        if sizes[shard.name] != shard.bytes:
            raise UserError(f"shard {storage / shard.name} has {sizes[shard.name]} bytes, but the summary says "
                            f"{shard.bytes}: it is truncated or was replaced; copy it again, or tokenize again")
        if INDEX_FOLDER + shard.part not in parts:
            raise UserError(f"index part {storage / INDEX_FOLDER}{shard.part} is missing; {REMEDY}")


class _TextPart:
    """Where the entries of one text shard lie: keys sorted in one array, found by bisection."""

    def __init__(self, table: pa.Table, where: str):
        self._table, self._where = table, where
        keys = np.array(self._table["key"].to_pylist(), dtype="S64")
        self._order = np.argsort(keys)
        self._keys = keys[self._order]

    def find(self, key: str) -> TextRow:
        at = int(np.searchsorted(self._keys, key.encode()))
        if at == len(self._keys) or self._keys[at] != key.encode():
            raise UserError(f"{self._where} has no text entry {key}: index and text shards do not belong together; "
                            "tokenize again, which makes only what is missing")
        return TextRow(**self._table.slice(int(self._order[at]), 1).to_pylist()[0])

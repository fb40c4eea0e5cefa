"""Index rows <-> parquet: one part for each shard, in index/.

A part does not say which shard it is or where its rows stand in the dataset: the summary lists the shards in
order, and that gives both. So a part stays valid when datasets grow or are merged. Its name holds a hash of its
content, so a part is never changed in place, and the summary holds that hash in full.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grn_scale.data.caption_columns import CaptionColumns
from grn_scale.data.schema import MOST_KEY_BYTES, Caption, IndexRow, ShardInfo, TextRef, TextRow
from grn_scale.errors import UserError
from grn_scale.storage import Storage

INDEX_FOLDER = "index/"
VIDEO_SCHEMA = pa.schema([
    ("key", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("xxh3", pa.uint64()),
    ("t", pa.int32()), ("h", pa.int32()), ("w", pa.int32()), ("ratio_key", pa.float64()), ("class_id", pa.int64()),
    ("captions", pa.list_(pa.struct([
        ("type", pa.string()),
        ("texts", pa.list_(pa.struct([("task", pa.string()), ("key", pa.string()), ("tokens", pa.int32()),
                                      ("shard", pa.string())])))])))])
TEXT_SCHEMA = pa.schema([
    ("key", pa.string()), ("tokens", pa.int32()), ("ids_offset", pa.int64()), ("ids_length", pa.int64()),
    ("ids_xxh3", pa.uint64()), ("states_offset", pa.int64()), ("states_length", pa.int64()),
    ("states_xxh3", pa.uint64())])
REMEDY = ("copy it again, or run `grn-scale index repair`, which mends it or says what to make again (`grn-scale "
          "verify` lists all damage)")


class DamagedPart(UserError):
    """An index part whose bytes are not those that the summary tells of."""


@dataclass(frozen=True)
class Payload:
    """Where the bytes of one sample lie in its tar."""

    offset: int
    length: int
    xxh3: int


def write_video_part(folder: str | Path | Storage, shard: ShardInfo, rows: Sequence[IndexRow],
                     empty_tokens: int = 0) -> ShardInfo:
    """Write the part of a video shard; the shard with the part's name and hash and the sums over its rows.

    `shard` and `row` of the rows are not stored. empty_tokens: of the empty caption, which any sample may be drawn
    with. ValueError for a key of more than 32 bytes.
    """
    return write_video_table(folder, shard, pa.Table.from_pylist([
        {"key": r.key, "offset": r.offset, "length": r.length, "xxh3": r.xxh3, "t": r.thw[0], "h": r.thw[1],
         "w": r.thw[2], "ratio_key": r.ratio_key, "class_id": r.class_id,
         "captions": [{"type": c.type, "texts": [{"task": task, "key": ref.key, "tokens": ref.tokens,
                                                  "shard": ref.shard} for task, ref in c.texts.items()]}
                      for c in r.captions]}
        for r in rows], schema=VIDEO_SCHEMA), empty_tokens)


def write_video_table(folder: str | Path | Storage, shard: ShardInfo, table: pa.Table,
                      empty_tokens: int = 0) -> ShardInfo:
    """What `write_video_part` does, for rows as a table of VIDEO_SCHEMA, read from another part or made."""
    table = table.cast(VIDEO_SCHEMA)  # parquet renames the items of lists, and the name is among a part's bytes
    lengths = pc.binary_length(table["key"]).to_numpy()
    if lengths.max(initial=0) > MOST_KEY_BYTES:
        key = table["key"][int(lengths.argmax())].as_py()
        raise ValueError(f"key {key!r} is longer than {MOST_KEY_BYTES} bytes")
    captions = CaptionColumns.of(table)
    texts = np.full(len(table), empty_tokens, np.int64)
    np.maximum.at(texts, captions.owners[captions.text_owners], captions.texts.field("tokens").to_numpy())
    visual = np.prod([table[name].to_numpy().astype(np.int64) for name in "thw"], axis=0)
    return replace(write_table(folder, shard, table), images=int((table["t"].to_numpy() == 1).sum()),
                   tokens=int(visual.sum()), longest=int((visual + texts + 1).max(initial=0)))


def write_text_part(folder: str | Path | Storage, shard: ShardInfo, rows: Sequence[TextRow]) -> ShardInfo:
    """Write the part of a text shard; the shard with the part's name and hash."""
    return write_table(folder, shard, pa.Table.from_pylist(
        [{name: getattr(row, name) for name in TEXT_SCHEMA.names} for row in rows], schema=TEXT_SCHEMA))


def write_table(folder: str | Path | Storage, shard: ShardInfo, table: pa.Table) -> ShardInfo:
    """Write the part of a shard, whose rows are the table's; the shard with the part's name and hash. What a table
    carries besides its columns is not written."""
    if len(table) != shard.samples:
        raise ValueError(f"{shard.name} has {shard.samples} samples, but the part {len(table)} rows")
    data = table_bytes(table.replace_schema_metadata().combine_chunks())
    digest = hashlib.sha256(data).hexdigest()
    name = f"{Path(shard.name).stem}-{digest[:8]}.parquet"
    storage = Storage.of(folder)
    if not storage.exists(INDEX_FOLDER + name) or storage.read(INDEX_FOLDER + name) != data:
        storage.write_bytes(INDEX_FOLDER + name, data)  # new, or in the place of a damaged one
    return replace(shard, part=name, part_sha256=digest)


def read_table(folder: str | Path | Storage, shard: ShardInfo, schema: pa.Schema) -> pa.Table:
    """Columns of a shard's part. UserError naming the part where it is missing or cannot be read, after several
    attempts; DamagedPart where it is damaged or of another form."""
    storage = Storage.of(folder)
    name = storage / f"{INDEX_FOLDER}{shard.part}"
    try:
        return part_table(storage, shard, schema)
    except FileNotFoundError as error:
        raise UserError(f"index part {name} is missing; {REMEDY}") from error
    except OSError as error:
        raise UserError(f"index part {name} cannot be read: {error.strerror or error}; look at the storage, then start "
                        "again") from error


def part_table(storage: Storage, shard: ShardInfo, schema: pa.Schema) -> pa.Table:
    """What `read_table` gives, but an OSError where the part is missing or cannot be read."""
    try:
        return _sound_table(storage, shard, schema)
    except DamagedPart:
        # What came over the network may be damaged, and the part itself be sound.
        return _sound_table(storage, shard, schema)


def _sound_table(storage: Storage, shard: ShardInfo, schema: pa.Schema) -> pa.Table:
    name = INDEX_FOLDER + shard.part
    data = storage.read(name)
    if hashlib.sha256(data).hexdigest() != shard.part_sha256:
        raise DamagedPart(f"index part {storage / name} is damaged: its sha256 is not the one in the summary; {REMEDY}")
    table = parse_table(data, storage / name, schema)
    if table.num_rows != shard.samples:
        raise DamagedPart(f"index part {storage / name} has {table.num_rows} rows, but the summary says "
                          f"{shard.samples} samples of {shard.name}; {REMEDY}")
    return table


def parse_table(data: bytes, where: str, schema: pa.Schema) -> pa.Table:
    """Table of a parquet file's bytes. DamagedPart where they are damaged or of another form."""
    try:
        # Not pq.read_table: its threads may still run when the interpreter ends, and then abort the process.
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DamagedPart(f"index part {where} cannot be read ({error}); {REMEDY}") from error
    if table.schema.remove_metadata() != schema:
        raise DamagedPart(f"index part {where} has other columns than this release reads: {table.schema.names}")
    return table


def table_bytes(table: pa.Table) -> bytes:
    """Parquet file of a table: the same bytes for the same table and library version."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_video_part(folder: str | Path | Storage, shard: ShardInfo, number: int, first_row: int) -> list[IndexRow]:
    """Rows of a video shard, which is number `number` of the dataset and starts at row `first_row`."""
    part = VideoPart(read_table(folder, shard, VIDEO_SCHEMA), number, first_row)
    return part.rows()


class VideoPart:
    """The table of a video part, from which single rows are made when they are asked for."""

    def __init__(self, table: pa.Table, number: int, first_row: int):
        self.table = table
        self._number, self._first_row = number, first_row
        self._plain = table.drop_columns(["captions"]).to_pydict()
        self._captions = table["captions"].combine_chunks()

    def row(self, i: int) -> IndexRow:
        """Row `i` of the part."""
        return self._row(i, self._captions[i].as_py())

    def rows(self) -> list[IndexRow]:
        """All rows, in the order of the tar."""
        return [self._row(i, captions) for i, captions in enumerate(self._captions.to_pylist())]

    def _row(self, i: int, captions: list[dict[str, Any]]) -> IndexRow:
        values = {name: column[i] for name, column in self._plain.items()}
        return IndexRow(
            shard=self._number, row=self._first_row + i, key=values["key"], offset=values["offset"],
            length=values["length"], xxh3=values["xxh3"], thw=(values["t"], values["h"], values["w"]),
            ratio_key=values["ratio_key"], class_id=values["class_id"], captions=tuple(
                Caption(c["type"], {x["task"]: TextRef(x["key"], x["tokens"], x["shard"]) for x in c["texts"]})
                for c in captions))

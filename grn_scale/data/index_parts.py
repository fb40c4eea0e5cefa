"""Index rows <-> parquet: one part for each shard, beside it in index/.

A part does not say which shard it is or where its rows stand in the dataset: `dataset.json` lists the shards in
order, and that gives both. So a part stays valid when datasets are merged. Pages carry checksums.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grn_scale.atomic import write_bytes
from grn_scale.data.schema import Caption, IndexRow, TextRef, TextRow
from grn_scale.errors import UserError

VIDEO_SCHEMA = pa.schema([
    ("key", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("xxh3", pa.uint64()),
    ("t", pa.int32()), ("h", pa.int32()), ("w", pa.int32()), ("ratio_key", pa.float64()), ("class_id", pa.int64()),
    ("captions", pa.list_(pa.struct([
        ("type", pa.string()),
        ("texts", pa.list_(pa.struct([("task", pa.string()), ("key", pa.string()), ("tokens", pa.int32())])))])))])
TEXT_SCHEMA = pa.schema([
    ("key", pa.string()), ("tokens", pa.int32()), ("ids_offset", pa.int64()), ("ids_length", pa.int64()),
    ("states_offset", pa.int64()), ("states_length", pa.int64()), ("xxh3", pa.uint64())])


@dataclass(frozen=True)
class Payload:
    """Where the bytes of one sample lie in its tar."""

    offset: int
    length: int
    xxh3: int


def part_path(folder: Path, shard: str) -> Path:
    """Index part of the tar called `shard` (video-000000.tar)."""
    return folder / "index" / (Path(shard).stem + ".parquet")


def write_video_part(path: Path, rows: Iterable[IndexRow]) -> None:
    """Write the part of one video shard; `shard` and `row` of the rows are not stored."""
    _write(path, VIDEO_SCHEMA, [
        {"key": r.key, "offset": r.offset, "length": r.length, "xxh3": r.xxh3, "t": r.thw[0], "h": r.thw[1],
         "w": r.thw[2], "ratio_key": r.ratio_key, "class_id": r.class_id,
         "captions": [{"type": c.type,
                       "texts": [{"task": task, "key": ref.key, "tokens": ref.tokens} for task, ref in c.texts.items()]}
                      for c in r.captions]}
        for r in rows])


def write_text_part(path: Path, rows: Iterable[TextRow]) -> None:
    """Write the part of one text shard; `shard` of the rows is not stored."""
    names = TEXT_SCHEMA.names
    _write(path, TEXT_SCHEMA, [{name: getattr(row, name) for name in names} for row in rows])


def read_video_part(path: Path, shard: int, first_row: int) -> list[IndexRow]:
    """Rows of a video part; its shard is number `shard` of the dataset and starts at row `first_row`."""
    return [
        IndexRow(shard=shard, row=first_row + i, key=r["key"], offset=r["offset"], length=r["length"], xxh3=r["xxh3"],
                 thw=(r["t"], r["h"], r["w"]), ratio_key=r["ratio_key"], class_id=r["class_id"],
                 captions=tuple(
                     Caption(c["type"], {x["task"]: TextRef(x["key"], x["tokens"]) for x in c["texts"]})
                     for c in r["captions"]))
        for i, r in enumerate(read_table(path, VIDEO_SCHEMA).to_pylist())]


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Columns of a part. UserError naming the part where it is missing, damaged or of another form."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise UserError(f"index part {path} is missing; tokenize again, which keeps all finished shards") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"index part {path} cannot be read ({error}); tokenize again, which keeps all finished "
                        "shards") from error
    if table.schema.remove_metadata() != schema:
        raise UserError(f"index part {path} has other columns than this release reads: {table.schema.names}")
    return table


def snapshot_of(folder: Path, shards: Sequence[str]) -> str:
    """Name of the state of the index (hex): sha256 over the content of the parts of `shards`, in order."""
    total = hashlib.sha256()
    for shard in shards:
        path = part_path(folder, shard)
        try:
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"index part {path} cannot be read: {error.strerror or error}") from error
        total.update(f"{shard} {digest}\n".encode())
    return total.hexdigest()


def _write(path: Path, schema: pa.Schema, rows: list[dict]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd", write_page_checksum=True)
    write_bytes(path, buffer.getvalue())

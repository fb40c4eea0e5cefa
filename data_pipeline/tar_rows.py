"""Index rows made from a tar alone: its members say all but the captions of clips."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from grn_scale.data.schema import IndexRow, TextRow
from grn_scale.data_pipeline.shard_members import Member, ShardStream, read_members
from grn_scale.storage import Storage


@dataclass(frozen=True)
class TarRows:
    """What was found in a tar."""

    bytes: int
    sha256: str
    rows: dict[str, IndexRow] | dict[str, TextRow]
    """By key, in the order of the tar; those of clips without captions. Empty where the tar cannot be read as one."""


def read_tar_rows(storage: Storage, name: str) -> TarRows | None:
    """The rows of the tar video-*.tar or text-*.tar; None where there is none. OSError where it cannot be read."""
    try:
        stream = ShardStream(storage, name)
    except FileNotFoundError:
        return None
    try:
        make = _text_rows if name.startswith("text-") else _video_rows
        rows = {row.key: row for row in make(read_members(stream))}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        rows = {}  # whatever the damage leads to; its sha256 shows it
    return TarRows(*stream.finish(), rows)


def _video_rows(members: Iterator[Member]) -> Iterator[IndexRow]:
    for bits, beside in zip(members, members):
        about = json.loads(beside.data)
        yield IndexRow(0, 0, bits.key, bits.offset, len(bits.data), xxhash.xxh3_64_intdigest(bits.data),
                       tuple(about["shape"]), about["bucket"]["ratio_key"], (), about["class_id"])


def _text_rows(members: Iterator[Member]) -> Iterator[TextRow]:
    row: TextRow | None = None
    for member in members:
        place = member.offset, len(member.data), xxhash.xxh3_64_intdigest(member.data)
        if member.suffix == "states":
            row = TextRow(row.key, row.tokens, row.ids_offset, row.ids_length, row.ids_xxh3, *place)
            continue
        if row is not None:
            yield row
        row = TextRow(member.key, len(json.loads(member.data)["ids"]), *place, 0, 0, 0)
    if row is not None:
        yield row

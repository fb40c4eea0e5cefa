"""Index rows made from a tar alone: its members say all but the captions of clips."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
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
    rows: dict[str, IndexRow] | dict[str, TextRow] | None
    """By key, in the order of the tar; those of clips without captions. None where its members do not say all."""


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
        rows = None  # damaged, as its sha256 shows, or with less in its JSON members than tokenize writes
    return TarRows(*stream.finish(), rows)


def row_sums(rows: Iterable[IndexRow], empty_tokens: int) -> dict[str, int]:
    """What the summary says of a video shard with these rows: images, tokens and longest. empty_tokens: of the empty
    caption."""
    images = tokens = longest = 0
    for row in rows:
        visual = math.prod(row.thw)
        texts = [ref.tokens for caption in row.captions for ref in caption.texts.values()]
        images += row.thw[0] == 1
        tokens += visual
        longest = max(longest, visual + max([empty_tokens, *texts]) + 1)
    return {"images": images, "tokens": tokens, "longest": longest}


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

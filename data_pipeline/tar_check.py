"""One tar against the index parts that are made of it; parts that are damaged are made anew as far as the tar says."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from grn_scale.data.index_parts import (
    TEXT_SCHEMA,
    read_table,
    read_video_part,
    write_text_part,
    write_video_part,
)
from grn_scale.data.schema import IndexRow, ShardInfo, TextRow
from grn_scale.data_pipeline.tar_rows import TarRows, read_tar_rows, row_sums
from grn_scale.errors import UserError
from grn_scale.storage import Storage


@dataclass(frozen=True)
class TarCheck:
    """What is right of a shard, as a record or the summary describes it."""

    shard: ShardInfo
    new: ShardInfo | None
    """The description that holds now; None where the tar is damaged or missing."""
    lost: str = ""
    """What is to be made again; "" where `new` is complete."""
    done: tuple[str, ...] = ()


def check_tar(storage: Storage, shards: Sequence[ShardInfo], in_records: Set[ShardInfo], empty_tokens: int | None,
              dry_run: bool) -> list[TarCheck]:
    """For each description of one tar what is right of it. The tar is whole where it is as any of them says.

    in_records: descriptions that get a part without captions where theirs is damaged, for tokenize to go on from.
    empty_tokens: of the empty caption, None where unknown. dry_run: write nothing.
    """
    tar = read_tar_rows(storage, shards[0].name)
    if tar is None:
        return [TarCheck(shard, None, "it is missing") for shard in shards]
    described = {(shard.bytes, shard.sha256) for shard in shards}
    if (tar.bytes, tar.sha256) not in described:
        return [TarCheck(shard, None, "it is damaged: its size or sha256 is another") for shard in shards]
    return [_check(storage, shard, tar, shard in in_records, empty_tokens, dry_run) for shard in shards]


def _check(storage: Storage, shard: ShardInfo, tar: TarRows, in_record: bool, empty_tokens: int | None,
           dry_run: bool) -> TarCheck:
    right = replace(shard, bytes=tar.bytes, sha256=tar.sha256)
    rows = _sound_rows(storage, right, tar)
    if rows is None:
        return replace(_with_new_part(storage, right, tar, in_record, dry_run), shard=shard)
    done = ()
    if shard.name.startswith("video-") and empty_tokens is not None:
        right = replace(right, **row_sums(rows, empty_tokens))
    if right != shard:
        done = (f"{shard.name}: its description is corrected",)
    return TarCheck(shard, right, done=done)


def _with_new_part(storage: Storage, shard: ShardInfo, tar: TarRows, in_record: bool, dry_run: bool) -> TarCheck:
    """The shard with a part made of the tar, where its own is damaged or missing."""
    if tar.rows is None:
        return TarCheck(shard, None, "its index part is damaged or missing, and its members do not say what is in it")
    made = replace(shard, samples=len(tar.rows))
    rows = list(tar.rows.values())
    if shard.name.startswith("text-"):
        return TarCheck(shard, shard if dry_run else write_text_part(storage, made, rows), done=(
            f"{shard.name}: its index part is made anew from the tar",))
    lost = "its index part is damaged or missing, and with it the captions"
    if not in_record:
        return TarCheck(shard, shard, lost)
    return TarCheck(shard, shard if dry_run else write_video_part(storage, made, rows), lost, (
        f"{shard.name}: gets an index part without captions, made from the tar",))


def _sound_rows(storage: Storage, shard: ShardInfo, tar: TarRows) -> list[IndexRow] | list[TextRow] | None:
    """Rows of the part, if it can be read and does not say another thing than the tar; else None."""
    try:
        if shard.name.startswith("text-"):
            texts = [TextRow(**row) for row in read_table(storage, shard, TEXT_SCHEMA).to_pylist()]
            return texts if tar.rows is None or texts == list(tar.rows.values()) else None
        clips = read_video_part(storage, shard, 0, 0)
    except UserError:
        return None
    plain = [replace(row, row=0, captions=()) for row in clips]
    return clips if tar.rows is None or all(row == tar.rows.get(row.key) for row in plain) else None

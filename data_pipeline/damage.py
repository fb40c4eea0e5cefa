"""What is wrong with a dataset: every tar read once, compared with its index part, the summary and dataset.json.

In memory are a few shards at a time, whatever the size of the dataset.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from grn_scale.data.dataset_info import DATASET_FILE, read_dataset_info, snapshot_name, snapshots
from grn_scale.data.index_parts import INDEX_FOLDER, TEXT_SCHEMA, read_table, read_video_part
from grn_scale.data.recent import Recent
from grn_scale.data.schema import DatasetInfo, IndexRow, ShardInfo, TextRef, TextRow
from grn_scale.data.text_payload import payload_bytes
from grn_scale.data_pipeline.shard_members import Member, ShardStream, read_members
from grn_scale.data_pipeline.tar_rows import row_sums
from grn_scale.errors import UserError
from grn_scale.storage import Storage

THREADS = min(8, os.cpu_count() or 1)
"""Shards that are read at a time."""
CACHED_TEXT_PARTS = 32
NAMED_MISSING = 3
"""Missing samples of a shard that are named; a damaged header hides all that follow."""


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it should be."""

    file: str
    what: str
    sample: str = ""
    """Its key, where the damage is in one sample."""

    @property
    def where(self) -> str:
        return f"{self.file}: sample {self.sample}" if self.sample else self.file

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


@dataclass(frozen=True)
class Inspected:
    """What a look at one shard has shown."""

    damage: tuple[Damage, ...]
    whole: bool
    """Whether the tar has the size and sha256 that it should have; then the fault is with its part, if there is one."""
    unlisted: int = 0
    """Samples in the tar that the index lacks: clips that are in the index of another shard already."""


def find_damage(folder: str | Path | Storage, progress: bool = False, threads: int = THREADS,
                counts: Counter[str] | None = None) -> Iterator[Damage]:
    """Everything that is wrong with the newest state of a dataset; nothing where it is sound.

    counts: gets `unlisted`, the samples that are in a tar but not in the index. Of older snapshots it is looked at
    whether they can be read and their files are there. Raises UserError where dataset.json or the summary it names
    cannot be used.
    """
    storage = Storage.of(folder)
    info = read_dataset_info(storage)
    sizes = storage.sizes()
    texts = TextLengths(storage, info)
    yield from _check_totals(info)
    yield from texts.check([info.empty_text], DATASET_FILE)
    yield from _check_older(storage, info, sizes)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        try:
            for name, shards, inspect in (
                    ("text shards", info.text_shards, partial(inspect_text, storage, info)),
                    ("video shards", info.video_shards, partial(inspect_video, storage, info, texts))):
                for found in _tracked(pool.map(inspect, shards), len(shards), name, progress):
                    yield from found.damage
                    if counts is not None:
                        counts["unlisted"] += found.unlisted
        finally:
            pool.shutdown(cancel_futures=True)


def inspect_video(storage: Storage, info: DatasetInfo, texts: TextLengths, shard: ShardInfo) -> Inspected:
    """One video shard: tar, part, the members' own JSON, the texts it needs, and what the summary says of it."""
    damage: list[Damage] = []
    rows: dict[str, IndexRow] | None = None
    try:
        rows = {row.key: row for row in read_video_part(storage, shard, 0, 0)}
    except UserError as error:
        damage.append(Damage(shard.name, str(error)))
    else:
        damage += _check_rows(info, shard, rows)
        damage += texts.check(dict.fromkeys(ref for row in rows.values() for caption in row.captions
                                            for ref in caption.texts.values()), shard.name)
    found: set[str] = set()
    whole = _read_tar(storage, shard, lambda members: _check_video(members, info, shard, rows, found), damage)
    damage += _missing(shard, (key for key in rows or () if key not in found))
    return Inspected(tuple(damage), whole, len(found - rows.keys()) if rows is not None else 0)


def inspect_text(storage: Storage, info: DatasetInfo, shard: ShardInfo) -> Inspected:
    """One text shard: tar, part, and the token ids."""
    damage: list[Damage] = []
    rows: dict[str, TextRow] | None = None
    try:
        rows = {row["key"]: TextRow(**row) for row in read_table(storage, shard, TEXT_SCHEMA).to_pylist()}
    except UserError as error:
        damage.append(Damage(shard.name, str(error)))
    found: set[tuple[str, str]] = set()
    whole = _read_tar(storage, shard, lambda members: _check_text(members, info, shard, rows, found), damage)
    suffixes = ("json",) if info.text_states == "none" else ("json", "states")
    damage += _missing(shard, (key for key in rows or () if any((key, suffix) not in found for suffix in suffixes)))
    return Inspected(tuple(damage), whole)


def _read_tar(storage: Storage, shard: ShardInfo, check: Callable[[Iterator[Member]], Iterator[Damage]],
              damage: list[Damage]) -> bool:
    """Whether the tar's bytes are those the summary says, after `check` has seen its members; adds to `damage`."""
    try:
        stream = ShardStream(storage, shard.name)
        try:
            for found in check(read_members(stream)):
                damage.append(found)
        except ValueError as error:
            damage.append(Damage(shard.name, f"no readable tar: {error}"))
        size, sha256 = stream.finish()
    except OSError as error:
        damage.append(Damage(shard.name, f"cannot be read: {error.strerror or error}"))
        return False
    if size != shard.bytes:
        damage.append(Damage(shard.name, f"has {size} bytes, but the summary says {shard.bytes}"))
    elif sha256 != shard.sha256:
        damage.append(Damage(shard.name, "its sha256 is not the one in the summary"))
    return (size, sha256) == (shard.bytes, shard.sha256)


def _check_video(members: Iterator[Member], info: DatasetInfo, shard: ShardInfo, rows: Mapping[str, IndexRow] | None,
                 found: set[str]) -> Iterator[Damage]:
    """Adds the keys to `found`. rows: None where the part cannot be read."""
    bits: Member | None = None
    for member in members:
        row = (rows or {}).get(member.key)
        if bits is not None and (member.key, member.suffix) == (bits.key, "json"):
            yield from _check_about(info, shard, bits, member.data, row)
            bits = None
        elif bits is None and member.suffix == "bits" and member.key not in found:
            bits = member
            found.add(member.key)
            if row is not None:
                yield from _check_payload(shard, member, (row.offset, row.length, row.xxh3))
        else:
            yield _out_of_place(shard, member)
    if bits is not None:
        yield Damage(shard.name, "has no JSON member", bits.key)


def _check_text(members: Iterator[Member], info: DatasetInfo, shard: ShardInfo, rows: Mapping[str, TextRow] | None,
                found: set[tuple[str, str]]) -> Iterator[Damage]:
    """Adds the keys and suffixes to `found`. rows: None where the part cannot be read."""
    for member in members:
        if member.suffix not in ("json", "states") or (member.key, member.suffix) in found:
            yield _out_of_place(shard, member)
            continue
        found.add((member.key, member.suffix))
        if rows is None:
            continue
        row = rows.get(member.key)
        if row is None:
            yield Damage(shard.name, "is in the tar, but not in the index", member.key)
        elif member.suffix == "json":
            yield from _check_payload(shard, member, (row.ids_offset, row.ids_length, row.ids_xxh3))
            ids = parse_object(member.data).get("ids")
            if not isinstance(ids, list) or len(ids) != row.tokens:
                yield Damage(shard.name, f"its token ids are not {row.tokens}, as the index says", member.key)
        else:
            yield from _check_payload(shard, member, (row.states_offset, row.states_length, row.states_xxh3))
            if len(member.data) != payload_bytes(row.tokens, info.text_hidden_size, info.text_states):
                yield Damage(shard.name, f"its states are not those of {row.tokens} tokens", member.key)


def _out_of_place(shard: ShardInfo, member: Member) -> Damage:
    return Damage(shard.name, f"holds {member.key}.{member.suffix}, which is no part of the format or not at its place")


def _missing(shard: ShardInfo, keys: Iterable[str]) -> Iterator[Damage]:
    missing = list(keys)
    for key in missing[:NAMED_MISSING]:
        yield Damage(shard.name, "is in the index, but not in the tar", key)
    if len(missing) > NAMED_MISSING:
        yield Damage(shard.name, f"{len(missing) - NAMED_MISSING} more samples of the index are not in the tar")


def _check_rows(info: DatasetInfo, shard: ShardInfo, rows: dict[str, IndexRow]) -> Iterator[Damage]:
    if len(rows) != shard.samples:
        yield Damage(shard.name, f"its index part names a key twice: {len(rows)} keys in {shard.samples} rows")
    for row in rows.values():
        length = (math.prod(row.thw) * info.latent_channels * info.rounds + 7) // 8
        if row.length != length:
            yield Damage(shard.name, f"{row.length} bytes in the index, but {row.thw} latent cells take {length}",
                         row.key)
    for name, value in row_sums(rows.values(), info.empty_text.tokens).items():
        if getattr(shard, name) != value:
            yield Damage(shard.name, f"the summary says {name} {getattr(shard, name)}, but its part has {value}")


def _check_payload(shard: ShardInfo, member: Member, entry: tuple[int, int, int]) -> Iterator[Damage]:
    if (member.offset, len(member.data)) != entry[:2]:
        yield Damage(shard.name, f"{member.suffix} lies at byte {member.offset} with {len(member.data)} bytes, but the "
                                 f"index says byte {entry[0]} with {entry[1]}", member.key)
    if xxhash.xxh3_64_intdigest(member.data) != entry[2]:
        yield Damage(shard.name, "its bytes do not match their checksum", member.key)


def _check_about(info: DatasetInfo, shard: ShardInfo, bits: Member, data: bytes,
                 row: IndexRow | None) -> Iterator[Damage]:
    """The JSON beside a clip's bits says what the bits, the index and dataset.json say."""
    about = parse_object(data)
    wanted = {"xxh3": f"{xxhash.xxh3_64_intdigest(bits.data):016x}", "sha256": hashlib.sha256(bits.data).hexdigest()}
    for name, value in wanted.items():
        if about.get(name) != value:
            yield Damage(shard.name, f"its JSON member gives another {name} than its bytes have", bits.key)
    known = {"latent_channels": info.latent_channels, "rounds": info.rounds, "fps": info.fps}
    if row is not None:
        known |= {"shape": list(row.thw), "class_id": row.class_id}
    for name, value in known.items():
        if name in about and about[name] != value:
            yield Damage(shard.name, f"its JSON member says {name} {about[name]}, but the index says {value}", bits.key)


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object; an empty one where it is none, which lacks whatever is asked of it."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


class TextLengths:
    """How many tokens each text entry has, by the parts of the text shards, of which a few are kept. For any thread."""

    def __init__(self, storage: Storage, info: DatasetInfo):
        self._storage = storage
        self._shards = {shard.name: shard for shard in info.text_shards}
        self._parts: Recent[str, dict[str, int] | None] = Recent(CACHED_TEXT_PARTS)

    def check(self, refs: Iterable[TextRef], file: str) -> Iterator[Damage]:
        """Those of the entries that are not there, or have another length."""
        for ref in refs:
            if ref.shard not in self._shards:
                yield Damage(file, f"text {ref.key} is to be in {ref.shard}, which is no shard of the dataset")
                continue
            lengths = self._parts.get(ref.shard, self._read)
            if lengths is not None and lengths.get(ref.key) != ref.tokens:
                found = f"has {lengths[ref.key]} tokens there" if ref.key in lengths else "is not there"
                yield Damage(file, f"text {ref.key}, of {ref.tokens} tokens in {ref.shard} by the video index, {found}")

    def _read(self, name: str) -> dict[str, int] | None:
        try:
            table = read_table(self._storage, self._shards[name], TEXT_SCHEMA)
        except UserError:
            return None  # reported with its shard
        return dict(zip(table["key"].to_pylist(), table["tokens"].to_pylist()))


def _check_totals(info: DatasetInfo) -> Iterator[Damage]:
    for name in ("samples", "tokens"):
        total = sum(getattr(shard, name) for shard in info.video_shards)
        if total != getattr(info, name):
            yield Damage(DATASET_FILE, f"says {getattr(info, name)} {name}, but its shards sum up to {total}")


def _check_older(storage: Storage, info: DatasetInfo, sizes: dict[str, int]) -> Iterator[Damage]:
    """Older snapshots: can be read, and what they refer to is there."""
    parts = storage.sizes(INDEX_FOLDER)
    for snapshot in snapshots(storage):
        if info.snapshot.startswith(snapshot):
            continue
        try:
            older = read_dataset_info(storage, snapshot)
        except UserError as error:
            yield Damage(snapshot_name(snapshot), str(error))
            continue
        for shard in (*older.video_shards, *older.text_shards):
            if sizes.get(shard.name) != shard.bytes or INDEX_FOLDER + shard.part not in parts:
                yield Damage(shard.name, f"it or its part is missing or of another size, and snapshot {snapshot} "
                                         "needs both")


def _tracked(found: Iterator[Inspected], total: int, name: str, progress: bool) -> Iterator[Inspected]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(found, name, total, console=Console(stderr=True)) if progress else found)

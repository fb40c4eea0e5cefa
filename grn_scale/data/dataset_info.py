"""dataset.json and the summaries behind it: which shards a dataset has, now and in its earlier states."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from grn_scale.data.index_parts import INDEX_FOLDER, REMEDY, parse_table, table_bytes
from grn_scale.data.schema import FORMAT_VERSION, DatasetInfo, ShardInfo, TextRef
from grn_scale.errors import UserError
from grn_scale.storage import Storage

DATASET_FILE = "dataset.json"
SNAPSHOT_PREFIX = INDEX_FOLDER + "snapshot-"
SNAPSHOT_DIGITS = 16
"""Digits of a snapshot's id in the name of its summary."""
_SNAPSHOT = re.compile(rf"[0-9a-f]{{{SNAPSHOT_DIGITS},64}}")
_SETTINGS = b"dataset"
"""Key of the settings in a summary's metadata: an older state of the dataset needs no dataset.json of its own."""
_SUMMARY_SHA256 = "summary_sha256"
"""In dataset.json beside the settings: no other reader than ours sees a damaged summary."""
_SUMMARY = pa.schema([
    ("family", pa.string()), ("name", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()),
    ("sha256", pa.string()), ("part", pa.string()), ("part_sha256", pa.string()), ("images", pa.int64()),
    ("tokens", pa.int64()), ("longest", pa.int64())])
_FAMILIES = {"video": "video_shards", "text": "text_shards"}


def snapshot_name(snapshot: str) -> str:
    """Name of the summary of a snapshot, given its id or at least the first 16 digits."""
    return f"{SNAPSHOT_PREFIX}{snapshot[:SNAPSHOT_DIGITS]}.parquet"


def write_dataset(folder: str | Path | Storage, info: DatasetInfo) -> DatasetInfo:
    """Write the summary of the shards, then dataset.json: the last step of every change.

    Comes back with `samples`, `tokens` and `snapshot` filled in. ValueError for a shard without an index part.
    """
    for shard in (*info.video_shards, *info.text_shards):
        if not shard.part:
            raise ValueError(f"{shard.name} has no index part yet")
    info = replace(info, format_version=FORMAT_VERSION, samples=sum(shard.samples for shard in info.video_shards),
                   tokens=sum(shard.tokens for shard in info.video_shards), snapshot=_snapshot_id(info))
    settings = {field.name: getattr(info, field.name) for field in dataclasses.fields(info)
                if field.name not in _FAMILIES.values()}
    settings["empty_text"] = dataclasses.asdict(info.empty_text)
    rows = [{"family": family, **dataclasses.asdict(shard)}
            for family, name in _FAMILIES.items() for shard in getattr(info, name)]
    table = pa.Table.from_pylist(rows, schema=_SUMMARY.with_metadata({_SETTINGS: json.dumps(settings).encode()}))
    storage, summary = Storage.of(folder), table_bytes(table)
    storage.write_bytes(snapshot_name(info.snapshot), summary)
    document = {**settings, _SUMMARY_SHA256: hashlib.sha256(summary).hexdigest()}
    storage.write_bytes(DATASET_FILE, f"{json.dumps(document, indent=1, ensure_ascii=False)}\n".encode())
    return info


def read_dataset_info(folder: str | Path | Storage, snapshot: str = "") -> DatasetInfo:
    """The newest state of a dataset, or the one that `snapshot` names: its id, or the first 16 digits.

    UserError where the folder is no dataset, of another format version, damaged, or has no such snapshot.
    """
    storage = Storage.of(folder)
    newest = _parse(_read(storage, DATASET_FILE, f"{storage.location} is no tokenized dataset: it has no "
                    f"{DATASET_FILE}, which is written last; run `grn-scale tokenize` to its end, or correct the path"),
                    storage / DATASET_FILE)
    wanted = snapshot or newest.get("snapshot")
    if not isinstance(wanted, str) or not _SNAPSHOT.fullmatch(wanted):
        raise UserError(f"{wanted!r} names no snapshot; give its id, or its first {SNAPSHOT_DIGITS} digits")
    name = snapshot_name(wanted)
    data = _read(storage, name, f"{storage.location} has no snapshot {wanted}; it has " + ", ".join(snapshots(storage)))
    summary_sha256 = newest.pop(_SUMMARY_SHA256, None)
    if not snapshot and hashlib.sha256(data).hexdigest() != summary_sha256:
        raise UserError(f"{storage / name} is not what {DATASET_FILE} was written for: it is damaged or was replaced; "
                        f"{REMEDY}")
    table = parse_table(data, storage / name, _SUMMARY)
    settings = _parse((table.schema.metadata or {}).get(_SETTINGS, b""), storage / name)
    if not snapshot and settings != newest:
        raise UserError(f"{storage / DATASET_FILE} does not say what its summary {storage / name} says: it was "
                        f"changed; {REMEDY}")
    shards: dict[str, list[ShardInfo]] = {field: [] for field in _FAMILIES.values()}
    try:
        for row in table.to_pylist():
            shards[_FAMILIES[row.pop("family")]].append(ShardInfo(**row))
        info = DatasetInfo(**{**settings, **{field: tuple(found) for field, found in shards.items()},
                              "empty_text": TextRef(**settings["empty_text"])})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{storage / name} is not what this release writes: {error!r}") from error
    if _snapshot_id(info) != info.snapshot or not info.snapshot.startswith(wanted):
        raise UserError(f"{storage / name} is damaged: its shards are not those of snapshot {wanted}; {REMEDY}")
    return info


def snapshots(folder: str | Path | Storage) -> list[str]:
    """First digits of the id of every snapshot of a dataset, sorted; which one is the newest, dataset.json says."""
    return [name.removeprefix(SNAPSHOT_PREFIX).partition(".")[0]
            for name in Storage.of(folder).names(SNAPSHOT_PREFIX) if name.endswith(".parquet")]


def _snapshot_id(info: DatasetInfo) -> str:
    """sha256 (hex) over all that the summary holds."""
    values = dataclasses.asdict(replace(info, format_version=FORMAT_VERSION, samples=0, tokens=0, snapshot=""))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(storage: Storage, name: str, missing: str) -> bytes:
    try:
        return storage.read(name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(missing) from error
    except OSError as error:
        raise UserError(f"{storage / name} cannot be read: {error.strerror or error}") from error


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}, but this release reads version {FORMAT_VERSION}; "
                        "tokenize again with this release, or use the release that wrote it")
    return values

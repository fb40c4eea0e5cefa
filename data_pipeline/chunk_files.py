"""The files that tokenize makes and keeps for each chunk, found by their names."""

from __future__ import annotations

import logging
import re
from collections import defaultdict

from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data_pipeline.read_ahead import read_ahead
from grn_scale.data_pipeline.records import FOLDER as RECORDS
from grn_scale.data_pipeline.records import SOURCES, ChunkRecord, RecordName
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

TAR = re.compile(r"(video|text)-\d{6,}(-[0-9a-f]{8})?\.tar")
PART = re.compile(r"index/(video|text)-\d{6,}(-[0-9a-f]{8})?-[0-9a-f]{8}\.parquet")
_SOURCES = re.compile(re.escape(SOURCES) + r"(\d{6,})\.json")


def chunk_of_file(name: str) -> int | None:
    """Number of the chunk that a file is kept for; None for any other file."""
    if record := RecordName.of(name):
        return record.number
    match = _SOURCES.fullmatch(name)
    return int(match[1]) if match else None


def chunk_files(storage: Storage) -> list[str]:
    """Names of all files that are kept for chunks, records first."""
    return [name for folder in (RECORDS, SOURCES) for name in storage.names(folder) if chunk_of_file(name) is not None]


def read_records(storage: Storage) -> tuple[dict[int, list[ChunkRecord]], list[str]]:
    """Records by chunk number, in order, and the names of those that cannot be read or are of no use.

    A record whose file was changed is among them as it is now: its shards may be told from it still.
    """
    found: dict[int, list[ChunkRecord]] = defaultdict(list)
    of_no_use = []
    names = [record for name in storage.names(RECORDS) if (record := RecordName.of(name))]
    for name, record in zip(names, read_ahead(lambda name: _read(storage, name), names)):
        if record is not None:
            found[name.number].append(record)
        else:
            of_no_use.append(str(name))
    return found, of_no_use


def _read(storage: Storage, name: RecordName) -> ChunkRecord | None:
    try:
        record = ChunkRecord.from_json(storage.read(name))
        usable = _plausible(record) and _without_content(record.name) == _without_content(name)
    except (ValueError, TypeError, KeyError, AttributeError, FileNotFoundError) as error:
        log.warning("%s cannot be used (%r)", storage / name, error)
        return None
    return record if usable else None


def _without_content(name: RecordName) -> str:
    return name.rpartition("-")[0]


def _plausible(record: ChunkRecord) -> bool:
    """Whether the shards of a record could be ones: their names are used as file names."""
    return all(isinstance(shard.name, str) and TAR.fullmatch(shard.name) and isinstance(shard.part, str) and
               PART.fullmatch(INDEX_FOLDER + shard.part) and isinstance(shard.samples, int) for shard in record.shards)

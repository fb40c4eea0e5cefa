"""The files that tokenize makes and keeps for each chunk, found by their names."""

from __future__ import annotations

import re

from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data_pipeline.records import FOLDER as RECORDS
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.storage import Storage

SOURCES = "sources/"
TAR = re.compile(r"(video|text)-\d{6,}(-[0-9a-f]{8})?\.tar")
PART = re.compile(r"index/(video|text)-\d{6,}(-[0-9a-f]{8})?-[0-9a-f]{8}\.parquet")
_RECORD = re.compile(r"chunks/(\d{6,})-[0-9a-f]{16}-\d+\.json")
_SOURCES = re.compile(r"sources/(\d{6,})\.json")


def chunk_of_file(name: str) -> int | None:
    """Number of the chunk that a file is kept for; None for any other file."""
    match = _RECORD.fullmatch(name) or _SOURCES.fullmatch(name)
    return int(match[1]) if match else None


def chunk_files(storage: Storage) -> list[str]:
    """Names of all files that are kept for chunks, records first."""
    return [name for folder in (RECORDS, SOURCES) for name in storage.names(folder) if chunk_of_file(name) is not None]


def read_records(storage: Storage) -> tuple[dict[int, list[ChunkRecord]], list[str]]:
    """Records by chunk number, in order, and the names of those that cannot be read or are of no use."""
    records = Records(storage)
    records.refresh()
    names = [name for name in chunk_files(storage) if name.startswith(RECORDS)]
    found = {number: [record for record in records.of_number(number) if record.name in names and _plausible(record)]
             for number in sorted({chunk_of_file(name) for name in names})}
    readable = {record.name for group in found.values() for record in group}
    return {number: group for number, group in found.items() if group}, [n for n in names if n not in readable]


def _plausible(record: ChunkRecord) -> bool:
    """Whether the shards of a record could be ones: their names are used as file names."""
    return all(isinstance(shard.name, str) and TAR.fullmatch(shard.name) and isinstance(shard.part, str) and
               PART.fullmatch(INDEX_FOLDER + shard.part) and isinstance(shard.samples, int) for shard in record.shards)

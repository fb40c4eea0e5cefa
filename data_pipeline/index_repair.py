"""grn-scale index repair: make what is damaged in a dataset ready to be made again, and nothing else.

    grn-scale index repair tokens/ --dry-run

A tar is judged by its sha256 and never touched. Where it is whole and its index part is not, the part is made from it:
fully for texts, without the captions for clips. Where a tar is damaged or missing, the record of its chunk forgets
it. The next run of `grn-scale tokenize` then makes just those shards and captions, and the index with them. Until it
has, dataset.json names what it named before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.data.dataset_info import read_dataset_info, snapshots, write_dataset
from grn_scale.data.index_parts import (
    INDEX_FOLDER,
    TEXT_SCHEMA,
    read_table,
    read_video_part,
    write_text_part,
    write_video_part,
)
from grn_scale.data.schema import DatasetInfo, ShardInfo, TextRow
from grn_scale.data_pipeline.chunk_files import read_records
from grn_scale.data_pipeline.job import JOB_FILE
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.data_pipeline.tar_rows import TarRows, read_tar_rows
from grn_scale.errors import EXIT_FAILED, UserError
from grn_scale.storage import Storage

_PART_HASH = re.compile(r".*-([0-9a-f]{8})\.parquet")
UNFINISHED = "0" * 64
"""Digest of the record of a chunk that has something left to be made."""


@dataclass
class Repair:
    """What was done (or would be), what `tokenize` is to make again, and what nobody can without another copy."""

    done: list[str]
    to_make: list[str]
    beyond: list[str]


def repair(storage: Storage, dry_run: bool = False) -> Repair:
    """Repair a dataset; see above. Not to be run while workers make shards in the folder.

    Raises UserError where the folder holds no dataset, OSError where it cannot be written.
    """
    return _Repairer(storage, dry_run).run()


class _Repairer:
    def __init__(self, storage: Storage, dry_run: bool):
        self._storage, self._dry_run = storage, dry_run
        self._report = Repair([], [], [])
        self._tars: dict[str, TarRows | None] = {}

    def run(self) -> Repair:
        info = self._newest()
        records, unreadable = read_records(self._storage)
        if info is None and not self._storage.exists(JOB_FILE):
            raise UserError(f"{self._storage.location} is no tokenized dataset, or nothing of its index is left; "
                            "correct the path, or copy dataset.json and index/ again")
        for name in unreadable:
            self._do(f"{name} cannot be read: removed, its chunk is made again")
            self._delete(name)
        known = self._descriptions(info, records)
        for group in records.values():
            # Where several records of a chunk are left by a kill, one of them is enough to go on from.
            mended = [self._mended(record, known) for record in group]
            for record, new in zip(group, mended):
                if new != record:
                    self._put(record, new)
        if info is not None:
            self._mend_summary(info, records, known)
        return self._report

    def _newest(self) -> DatasetInfo | None:
        try:
            return read_dataset_info(self._storage)
        except UserError as error:
            self._report.to_make.append(f"dataset.json: {error}")
            return None

    def _descriptions(self, info: DatasetInfo | None, records: dict[int, list[ChunkRecord]],
                      ) -> dict[str, set[tuple[int, str]]]:
        """Size and sha256 that each tar has by any record or snapshot: one of them may be damaged itself."""
        shards = [shard for group in records.values() for record in group for shard in record.shards]
        if info is not None:
            shards += [*info.video_shards, *info.text_shards]
        known = defaultdict(set)
        for shard in shards:
            known[shard.name].add((shard.bytes, shard.sha256))
        return known

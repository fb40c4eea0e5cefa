"""What has been made of the chunks so far: a small file for each finished chunk, found by listing a folder.

    chunks/000012-<digest>-0.json  ChunkRecord; the digest names the chunk's lines and all settings, so a chunk is
                                   finished where a record of its digest stands and its shards are there whole. The
                                   last number counts how often clips that failed have been tried again
    sources/000012.json            media files with their content hashes, and the lines that gave no sample and why
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data.schema import ShardInfo
from grn_scale.data_pipeline.chunks import Contents
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "chunks/"
READERS = 16
"""Records read at a time: they are small, and shared file systems slow to answer."""
_NAME = re.compile(re.escape(FOLDER) + r"(\d{6,})-[0-9a-f]{16}-\d+\.json")


@dataclass(frozen=True)
class ChunkRecord:
    """What a finished chunk was made from, and what came of it."""

    number: int
    digest: str
    """Of the chunk's manifest lines and the settings."""
    retries: int
    """Times that clips which had failed were tried again."""
    lines: int
    bad: Mapping[str, int]
    """Reason -> manifest lines that gave no sample."""
    failed: Mapping[str, str]
    """Key -> reason of the clips that could not be decoded; tokenizing again leaves them out."""
    video_from: str
    """What the video shard was made from; equal where it need not be made again."""
    text_from: str
    video: ShardInfo | None
    """None where no clip gave a sample."""
    text: ShardInfo | None
    """None where no text is needed."""

    @property
    def name(self) -> str:
        return f"{FOLDER}{self.number:06d}-{self.digest[:16]}-{self.retries}.json"

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in (self.video, self.text) if shard)


@dataclass(frozen=True)
class SourcesRecord:
    """What is remembered of a chunk's media files."""

    contents: Contents = field(default_factory=dict)
    bad: tuple[dict[str, Any], ...] = ()
    """For each line without a sample: line, id, path, reason, detail. One line of quarantine.jsonl each."""


class Records:
    """The records of a folder. `refresh` reads those that are new; several threads may ask."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._found: dict[str, ChunkRecord] = {}
        self._by_number: dict[int, list[ChunkRecord]] = {}
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Look for records that others have written since, and forget those that are gone.

        OSError where the storage fails.
        """
        with self._lock:
            names = {name for name in self._storage.names(FOLDER) if _NAME.fullmatch(name)}
            for gone in self._found.keys() - names:
                self._forget(gone)
            new = sorted(names - self._found.keys())
            with ThreadPoolExecutor(READERS, thread_name_prefix="read-records") as readers:
                for name, record in zip(new, readers.map(self._read, new)):
                    if record is not None:
                        self._keep(name, record)

    def drop_incomplete(self) -> None:
        """Remove the records whose shards or index parts are missing or cut off, after one look at the folder."""
        sizes, parts = self._storage.sizes(), set(self._storage.names(INDEX_FOLDER))
        for name, record in list(self._found.items()):
            missing = [shard.name for shard in record.shards if sizes.get(shard.name) != shard.bytes]
            missing += [part for shard in record.shards if (part := INDEX_FOLDER + shard.part) not in parts]
            if missing:
                log.warning("%s is missing or not whole: its chunk is made again", self._storage / missing[0])
                self._storage.delete(name)
                self._forget(name)

    def get(self, number: int, digest: str) -> ChunkRecord | None:
        """Record of a chunk made from just this, the newest where clips were tried again."""
        found = [record for record in self.of_number(number) if record.digest == digest]
        return max(found, key=lambda record: record.retries, default=None)

    def of_job(self, digests: Sequence[str]) -> list[ChunkRecord]:
        """Records of the finished ones of the chunks with these digests, in order."""
        return [record for number, digest in enumerate(digests) if (record := self.get(number, digest))]

    def count(self) -> int:
        """Records in all."""
        return len(self._found)

    def of_number(self, number: int) -> list[ChunkRecord]:
        """All records of a chunk number, also those made from other lines or settings."""
        return list(self._by_number.get(number, ()))

    def write(self, record: ChunkRecord) -> None:
        """The chunk is finished; its other records go."""
        with self._lock:
            self._storage.write_bytes(record.name, _json(dataclasses.asdict(record)))
            for old in self.of_number(record.number):
                if old.name != record.name:
                    self._storage.delete(old.name)
                self._forget(old.name)
            self._keep(record.name, record)

    def _keep(self, name: str, record: ChunkRecord) -> None:
        self._found[name] = record
        self._by_number.setdefault(record.number, []).append(record)

    def _forget(self, name: str) -> None:
        record = self._found.pop(name)
        self._by_number[record.number] = [kept for kept in self._by_number[record.number] if kept is not record]

    def read_sources(self, number: int) -> SourcesRecord:
        """What is remembered of a chunk's media files; nothing where that cannot be read."""
        try:
            values = json.loads(self._storage.read(_sources_name(number)))
            return SourcesRecord({name: tuple(entry) for name, entry in values["contents"].items()},
                                 tuple(dict(entry) for entry in values["bad"]))
        except FileNotFoundError:
            return SourcesRecord()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used (%r): its media files are read again", _sources_name(number), error)
            return SourcesRecord()

    def write_sources(self, number: int, sources: SourcesRecord) -> None:
        """Remember a chunk's media files and bad lines."""
        self._storage.write_bytes(_sources_name(number), _json(dataclasses.asdict(sources)))

    def bad_lines(self, digests: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Lines without a sample of the chunks with these digests, in the order of the manifest."""
        for number, digest in enumerate(digests):
            record = self.get(number, digest)
            if record is None or record.bad:
                yield from self.read_sources(number).bad

    def _read(self, name: str) -> ChunkRecord | None:
        try:
            values: dict[str, Any] = json.loads(self._storage.read(name))
            shards = {kind: values[kind] and ShardInfo(**values[kind]) for kind in ("video", "text")}
            return ChunkRecord(**{**values, **shards})
        except FileNotFoundError:
            return None  # replaced by a newer one meanwhile
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be used (%r): its chunk is made again", self._storage / name, error)
            return None


def _sources_name(number: int) -> str:
    return f"sources/{number:06d}.json"


def _json(value: Any) -> bytes:
    # ASCII: file names may hold what is no valid Unicode.
    return json.dumps(value, sort_keys=True, indent=1).encode()

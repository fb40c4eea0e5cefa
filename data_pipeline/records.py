"""What has been made of the chunks so far: a small file for each finished chunk, found by listing a folder.

    chunks/000012-<digest>-0-3-1-2-<content>.json   ChunkRecord. The digest names the chunk's lines and all settings, so
                                                    a chunk is finished where a record of its digest stands and its
                                                    shards are there whole; the other parts are those of RecordName
    sources/000012.json                             SourcesRecord: the chunk's media files with their content hashes

A folder may hold 10^5 records and be looked at by hundreds of workers. So the names alone say all that workers need to
know of finished chunks: they hold the names, from one listing, and the files are read by who puts the dataset together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data.schema import ShardInfo
from grn_scale.data_pipeline.chunks import Contents
from grn_scale.data_pipeline.read_ahead import read_ahead
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "chunks/"
SOURCES = "sources/"
PASSING_REASONS = frozenset(("missing", "unreadable"))
"""Reasons of lines without a sample that may be gone at the next run: a mount that was not there."""
_DIGITS = 16
_NAME = re.compile(re.escape(FOLDER) + rf"\d{{6,}}-[0-9a-f]{{{_DIGITS}}}-\d+-\d+-\d+-\d+-[0-9a-f]{{8}}\.json")


class RecordName(str):
    """File name of a record, from which most of what it says can be told."""

    __slots__ = ()

    @staticmethod
    def of(name: str) -> RecordName | None:
        """The name of a file, where it is a record's."""
        return RecordName(name) if _NAME.fullmatch(name) else None

    @property
    def number(self) -> int:
        """Of the chunk."""
        return int(self._parts[0])

    @property
    def digest(self) -> str:
        """First digits of the record's digest."""
        return self._parts[1]

    @property
    def retries(self) -> int:
        """Times that the chunk was made again for clips that had failed or were missing."""
        return int(self._parts[2])

    @property
    def bad(self) -> int:
        """Manifest lines that gave no sample."""
        return int(self._parts[3])

    @property
    def passing(self) -> int:
        """How many of these may do so at the next run, by their reason."""
        return int(self._parts[4])

    @property
    def failed(self) -> int:
        """Clips that could not be decoded."""
        return int(self._parts[5])

    @property
    def content(self) -> str:
        """First digits of the sha256 of the file."""
        return self._parts[6]

    @property
    def _parts(self) -> list[str]:
        return self[len(FOLDER):-len(".json")].split("-")


@dataclass(frozen=True)
class ChunkRecord:
    """What a finished chunk was made from, and what came of it."""

    number: int
    digest: str
    """Of the chunk's manifest lines and the settings."""
    retries: int
    """Times that the chunk was made again for clips that had failed or were missing."""
    bad: Sequence[Mapping[str, Any]]
    """For each line without a sample: line, id, path, member (of a tar), key, reason, detail. One line of
    quarantine.jsonl each."""
    failed: Mapping[str, str]
    """Key -> reason of the clips that could not be decoded; tokenizing again leaves them out."""
    video_from: str
    """What the video shard was made from; equal where it need not be made again."""
    text_from: str
    video: ShardInfo | None
    """None where no clip gave a sample."""
    text: ShardInfo | None
    """None where no text is needed."""

    @staticmethod
    def from_json(data: bytes) -> ChunkRecord:
        """The record that a file holds. ValueError, TypeError or KeyError where it holds none."""
        values: dict[str, Any] = json.loads(data)
        shards = {kind: values[kind] and ShardInfo(**values[kind]) for kind in ("video", "text")}
        return ChunkRecord(**{**values, **shards})

    def to_json(self) -> bytes:
        """What its file holds."""
        return _json(dataclasses.asdict(self))

    @property
    def name(self) -> RecordName:
        """Of its file."""
        passing = sum(line["reason"] in PASSING_REASONS for line in self.bad)
        return RecordName(f"{FOLDER}{self.number:06d}-{self.digest[:_DIGITS]}-{self.retries}-{len(self.bad)}-{passing}-"
                          f"{len(self.failed)}-{_content(self.to_json())}.json")

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        return tuple(shard for shard in (self.video, self.text) if shard)


@dataclass(frozen=True)
class SourcesRecord:
    """What is remembered of a chunk's media files."""

    contents: Contents = field(default_factory=dict)
    digest: str = ""
    """Of the chunk that `bad` belongs to."""
    bad: Sequence[Mapping[str, Any]] = ()
    """Lines without a sample, as in ChunkRecord, of a chunk that was not finished because they were too many."""


class Records:
    """The records of a folder, as they were at the last `refresh`; several threads may ask.

    Holds the names only, about 300 bytes a record.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._names: set[RecordName] = set()
        self._by_number: dict[int, tuple[RecordName, ...]] = {}
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Look which records there are: one listing, no file is read. OSError where the storage fails."""
        with self._lock:
            listed = set(self._storage.names(FOLDER))
            for gone in self._names - listed:
                self._forget(gone)
            for new in map(RecordName.of, listed - self._names):
                if new is not None:
                    self._keep(new)

    def drop_incomplete(self) -> None:
        """Remove the records that cannot be used, and those whose shards or index parts are missing or cut off.

        Refreshes, reads all records and lists all shards: for one process of the fleet. OSError where the storage
        fails.
        """
        self.refresh()
        names = self.all()
        if not names:
            return
        for name, record in zip(names, self.read_whole(names)):
            if record is None:
                self._storage.delete(name)
                with self._lock:
                    self._forget(name)

    def read_whole(self, names: Sequence[RecordName]) -> Iterator[ChunkRecord | None]:
        """What the records of these names say, in order; None for those that cannot be used, and for those whose shards
        or index parts are missing or cut off, which a warning says. Lists all shards. OSError where the storage fails.
        """
        # Listed after the records: what a record names was there before it.
        sizes, parts = self._storage.sizes(), set(self._storage.names(INDEX_FOLDER))
        for record in self.read_all(names):
            shards = record.shards if record else ()
            missing = [shard.name for shard in shards if sizes.get(shard.name) != shard.bytes]
            missing += [part for shard in shards if (part := INDEX_FOLDER + shard.part) not in parts]
            if missing:
                log.warning("%s is missing or not whole: its chunk is made again", self._storage / missing[0])
            yield None if missing else record

    def all(self) -> list[RecordName]:
        """Names of all records, also those made from other lines or settings."""
        with self._lock:
            return sorted(self._names)

    def get(self, number: int, digest: str) -> RecordName | None:
        """Record of a chunk made from just this, the newest where clips were tried again."""
        found = [name for name in self._by_number.get(number, ()) if name.digest == digest[:_DIGITS]]
        return max(found, key=lambda name: (name.retries, name), default=None)

    def finished(self, digests: Sequence[str]) -> list[RecordName]:
        """Records of the finished ones of the chunks with these digests, in order."""
        return [name for number, digest in enumerate(digests) if (name := self.get(number, digest))]

    def fingerprint(self, digests: Sequence[str]) -> str:
        """Names what the records of the chunks with these digests hold (hex), "" where one is not finished."""
        names = self.finished(digests)
        return hashlib.sha256("\n".join(names).encode()).hexdigest() if len(names) == len(digests) else ""

    def read(self, name: RecordName) -> ChunkRecord | None:
        """What a record says; None where it is gone, or damaged, which a warning says."""
        try:
            data = self._storage.read(name)
            if _content(data) != name.content:
                raise ValueError("it is not what was written")
            return ChunkRecord.from_json(data)
        except FileNotFoundError:
            return None  # replaced by a newer one meanwhile
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s cannot be used (%s): its chunk is made again", self._storage / name, error)
            return None

    def read_all(self, names: Iterable[RecordName]) -> Iterator[ChunkRecord | None]:
        """What the records of these names say, in order, a few of them in memory at a time."""
        return read_ahead(self.read, names)

    def of_job(self, digests: Sequence[str]) -> Iterator[ChunkRecord]:
        """What the records of the finished ones of the chunks with these digests say, in order."""
        return (record for record in self.read_all(self.finished(digests)) if record is not None)

    def of_number(self, number: int) -> list[ChunkRecord]:
        """What all records of a chunk number say, also those made from other lines or settings."""
        return [record for name in self._by_number.get(number, ()) if (record := self.read(name))]

    def write(self, record: ChunkRecord) -> None:
        """The chunk is finished; its other records go."""
        name = record.name
        with self._lock:
            self._storage.write_bytes(name, record.to_json())
            for old in self._by_number.get(record.number, ()):
                if old != name:
                    self._storage.delete(old)
                self._forget(old)
            self._keep(name)

    def _keep(self, name: RecordName) -> None:
        self._names.add(name)
        self._by_number[name.number] = tuple(sorted((*self._by_number.get(name.number, ()), name)))

    def _forget(self, name: RecordName) -> None:
        self._names.discard(name)
        self._by_number[name.number] = tuple(kept for kept in self._by_number.get(name.number, ()) if kept != name)

    def read_sources(self, number: int) -> SourcesRecord:
        """What is remembered of a chunk's media files; nothing where that cannot be read."""
        try:
            values = json.loads(self._storage.read(_sources_name(number)))
            return SourcesRecord({name: tuple(entry) for name, entry in values["contents"].items()},
                                 str(values["digest"]), tuple(dict(entry) for entry in values["bad"]))
        except FileNotFoundError:
            return SourcesRecord()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used (%r): its media files are read again", _sources_name(number), error)
            return SourcesRecord()

    def write_sources(self, number: int, sources: SourcesRecord) -> None:
        """Remember a chunk's media files."""
        self._storage.write_bytes(_sources_name(number), _json(dataclasses.asdict(sources)))

    def bad_lines(self, digests: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """Lines without a sample of the chunks with these digests, in the order of the manifest.

        Reads the records that have some, and of unfinished chunks what is remembered of their sources.
        """
        remembered = set(self._storage.names(SOURCES)) if len(self.finished(digests)) < len(digests) else set()
        wanted = [(number, digest) for number, digest in enumerate(digests)
                  if (name.bad if (name := self.get(number, digest)) else _sources_name(number) in remembered)]
        for lines in read_ahead(lambda chunk: self._bad_lines_of(*chunk), wanted):
            yield from lines

    def _bad_lines_of(self, number: int, digest: str) -> Sequence[Mapping[str, Any]]:
        name = self.get(number, digest)
        if name is not None:
            record = self.read(name)
            return record.bad if record else ()
        sources = self.read_sources(number)
        return sources.bad if sources.digest == digest else ()


def _content(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def _sources_name(number: int) -> str:
    return f"{SOURCES}{number:06d}.json"


def _json(value: Any) -> bytes:
    # ASCII: file names may hold what is no valid Unicode.
    return json.dumps(value, sort_keys=True, indent=1).encode()

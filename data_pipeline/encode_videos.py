"""First stage of tokenize: clips -> bits -> video shards, chunk by chunk.

What is encoded together is a function of the manifest alone: clips arrive in its order, wait by bucket and
length, and leave in batches. Decoding runs ahead in other processes, over the borders of chunks too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest
from grn_scale.data.decode_pool import DecodePool
from grn_scale.data.manifest import Clip
from grn_scale.data.shards import ShardWriter, write_shard
from grn_scale.data_pipeline.chunks import (
    ChunkRecord,
    Problem,
    Source,
    StoredClip,
    VideoSettings,
    digest,
    find_sources,
    finished,
    read_record,
    retire_shard,
    write_record,
)
from grn_scale.data_pipeline.meter import Meter
from grn_scale.errors import DoNotRequeue
from grn_scale.hbq import pack_bits
from grn_scale.tokenizer.clips import encode_frames
from grn_scale.tokenizer.video import VideoTokenizer

WAITING_BYTES = 1 << 30
"""Decoded frames that may wait for others of their shape; above it the fullest batch runs as it is."""


@dataclass(frozen=True)
class VideoChunk:
    """A chunk of the manifest and what is to be done about it."""

    number: int
    sources: tuple[Source, ...]
    """All its lines."""
    todo: tuple[Source, ...]
    """Each clip once, without those of earlier chunks and those with a problem."""
    contents: dict[str, tuple[int, int, str]]
    made_from: str
    record: ChunkRecord | None
    """Of the finished shard; None where it has to be made."""


class VideoStage:
    """Makes the video shards of a folder that are missing or made from something else."""

    def __init__(self, folder: Path, settings: VideoSettings, config: TokenizeConfig, tokenizer: VideoTokenizer,
                 meter: Meter, retry_bad: bool = False):
        """retry_bad: a shard that lacks a clip counts as missing."""
        self.folder = folder
        self.settings = settings
        self.config = config
        self.tokenizer = tokenizer
        self.meter = meter
        self.retry_bad = retry_bad
        self.sources: list[Source] = []
        """Of all lines read so far."""
        self.bad: dict[str, Problem] = {}
        """Keys that gave no sample."""
        self.kept = 0
        """Shards that were there already."""

    def run(self, clips: Sequence[Clip]) -> list[ChunkRecord]:
        """The record of every chunk of the manifest. DoNotRequeue where too many lines are bad."""
        records = []
        budget = _BadBudget(len(clips), self.config.max_bad_fraction, self.folder)
        pool = DecodePool(self.config.decode_processes, self.config.decode_timeout_seconds)
        with self.meter.stage("videos", len(clips)), pool:
            # The pool draws requests ahead of the results, so the same chunks are walked twice, at two places.
            planned, walked = itertools.tee(self._chunks(clips))
            decoded = pool.map(self._request(source) for chunk in planned if chunk.record is None
                               for source in chunk.todo)
            for chunk in walked:
                self.sources += chunk.sources
                keys = Counter(source.key for source in chunk.sources)
                budget.spend(keys[""] + sum(keys[key] for key in keys.keys() & self.bad.keys()))
                if chunk.record is None:
                    records.append(self._make(chunk, decoded, keys, budget))
                else:
                    records.append(chunk.record)
                    self.kept += 1
                    for key, problem in chunk.record.bad.items():
                        self.bad[key] = problem
                        budget.spend(keys[key])
                    self.meter.advance(len(chunk.todo))
                self.meter.advance(len(chunk.sources) - len(chunk.todo))
        return records

    def _chunks(self, clips: Sequence[Clip]) -> Iterator[VideoChunk]:
        """Chunks in order; the media files of the next one are read (for their hash) while one is worked on."""
        size = self.config.shard_samples
        parts = [clips[first : first + size] for first in range(0, len(clips), size)]
        seen: set[str] = set()

        def look(number: int) -> tuple[ChunkRecord | None, list[Source], dict[str, tuple[int, int, str]]]:
            record = read_record(self.record_path(number))
            return record, *find_sources(parts[number], self.settings, record.contents if record else {})

        with ThreadPoolExecutor(1, thread_name_prefix="content-hash") as reader:
            ahead = reader.submit(look, 0)
            for number in range(len(parts)):
                with self.meter.timed("hash_wait"):
                    record, sources, contents = ahead.result()
                if number + 1 < len(parts):
                    ahead = reader.submit(look, number + 1)
                todo: dict[str, Source] = {}
                for source in sources:
                    if source.key and source.key not in seen:
                        todo.setdefault(source.key, source)
                seen.update(todo)
                made_from = digest([[key, source.clip.id, source.clip.class_id] for key, source in todo.items()])
                yield VideoChunk(number, tuple(sources), tuple(todo.values()), contents, made_from,
                                 record if self._usable(record, made_from) else None)

    def _usable(self, record: ChunkRecord | None, made_from: str) -> bool:
        return finished(record, made_from, self.folder) and not (self.retry_bad and record.bad)

    def record_path(self, number: int) -> Path:
        return self.folder / "chunks" / f"video-{number:06d}.json"

    def _request(self, source: Source) -> DecodeRequest:
        clip = source.clip
        return DecodeRequest(str(clip.path), self.config.fps, self.config.max_frames, clip.begin_frame, clip.end_frame,
                             latent_side=self.config.latent_side)

    def _make(self, chunk: VideoChunk, decoded: Iterator[tuple[DecodeRequest, DecodedClip | DecodeError]],
              keys: Counter[str], budget: _BadBudget) -> ChunkRecord:
        record_path = self.record_path(chunk.number)
        shard = self.folder / f"video-{chunk.number:06d}.tar"
        retire_shard(shard, record_path)
        rows: list[StoredClip] = []
        bad: dict[str, Problem] = {}
        with write_shard(shard) as writer:
            batches = _Batches(self.config.batch_clips)
            for source in chunk.todo:
                with self.meter.timed("decode_wait"):
                    _, result = next(decoded)
                if isinstance(result, DecodeError):
                    bad[source.key] = self.bad[source.key] = Problem(result.reason, result.detail)
                    budget.spend(keys[source.key])
                    self.meter.advance()
                    continue
                for batch in batches.add(source, result):
                    rows += self._store(writer, batch)
            for batch in batches.rest():
                rows += self._store(writer, batch)
        record = ChunkRecord(chunk.made_from, writer.info, tuple(rows), bad, chunk.contents)
        write_record(record_path, record)
        return record

    def _store(self, writer: ShardWriter, batch: list[tuple[Source, DecodedClip]]) -> list[StoredClip]:
        with self.meter.timed("encode"):
            encoded = encode_frames(self.tokenizer, np.stack([clip.frames for _, clip in batch]), self.settings.rounds)
        rows = []
        with self.meter.timed("write"):
            for (source, clip), bits in zip(batch, encoded):
                thw = tuple(bits.shape[:3])
                about = {"id": source.clip.id, "class_id": source.clip.class_id, "shape": thw,
                         "latent_channels": self.settings.latent_channels, "rounds": self.settings.rounds,
                         "fps": self.config.fps, "source_fps": clip.source_fps,
                         "bucket": {"height": clip.frames.shape[1], "width": clip.frames.shape[2],
                                    "ratio_key": clip.ratio_key}}
                payload = writer.add_video(source.key, pack_bits(bits), about)
                rows.append(StoredClip(source.key, payload.offset, payload.length, payload.xxh3, thw, clip.ratio_key))
        self.meter.clips += len(batch)
        self.meter.frames += sum(len(clip.frames) for _, clip in batch)
        self.meter.advance(len(batch))
        return rows


class _BadBudget:
    """How many manifest lines may give no sample before the job stops."""

    def __init__(self, lines: int, fraction: float, folder: Path):
        self._lines, self._fraction, self._folder = lines, fraction, folder
        self._spent = 0

    def spend(self, lines: int) -> None:
        """Count bad lines; DoNotRequeue where there are now too many."""
        self._spent += lines
        # A fraction above 0 allows one line at least: the first try with three clips should go on too.
        allowed = max(1, self._fraction * self._lines) if self._fraction > 0 else 0
        if self._spent > allowed:
            raise DoNotRequeue(
                f"{self._spent} of the manifest's {self._lines} lines give no sample, more than "
                f"tokenize.max_bad_fraction ({self._fraction:g}) allows; see {self._folder / 'quarantine.jsonl'}: mend "
                "or remove those lines, or raise the limit")


class _Batches:
    """Clips that wait for others of their shape. Depends on the order they come in, and on nothing else."""

    def __init__(self, size: int):
        self._size = size
        self._waiting: dict[tuple[int, ...], list[tuple[Source, DecodedClip]]] = {}
        self._bytes = 0

    def add(self, source: Source, clip: DecodedClip) -> Iterator[list[tuple[Source, DecodedClip]]]:
        """Take one clip; yields the batches that are now due."""
        shape = clip.frames.shape
        self._waiting.setdefault(shape, []).append((source, clip))
        self._bytes += clip.frames.nbytes
        if len(self._waiting[shape]) == self._size:
            yield self._take(shape)
        while self._bytes > WAITING_BYTES:
            yield self._take(max(self._waiting, key=lambda waiting: len(self._waiting[waiting])))

    def rest(self) -> Iterator[list[tuple[Source, DecodedClip]]]:
        """The batches that are not full, the shape that has waited longest first."""
        while self._waiting:
            yield self._take(next(iter(self._waiting)))

    def _take(self, shape: tuple[int, ...]) -> list[tuple[Source, DecodedClip]]:
        batch = self._waiting.pop(shape)
        self._bytes -= sum(clip.frames.nbytes for _, clip in batch)
        return batch

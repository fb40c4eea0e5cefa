"""Which clips a chunk of the manifest holds, under which keys, and what has been made of it already.

A chunk is a run of `tokenize.shard_samples` manifest lines; it becomes one video shard and one text shard. Its
record, chunks/<shard>.json, is written after the shard and names what the shard was made from, so that a later
run makes only what is missing or has changed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from grn_scale.atomic import write_json
from grn_scale.data.manifest import Clip
from grn_scale.data.schema import ShardInfo
from grn_scale.data.shards import DATASET_FILE
from grn_scale.tokenizer.text import clean_caption

PREPROCESSING_VERSION = 1
"""Raised when decoding, resizing or normalisation change what the tokenizer sees."""
HASH_BYTES = 1 << 22


@dataclass(frozen=True)
class VideoSettings:
    """What the bits of a clip depend on, besides its own frames."""

    tokenizer: str
    """Fingerprint of the video tokenizer, quantiser settings included."""
    latent_channels: int
    rounds: int
    fps: float
    max_frames: int
    latent_side: int


@dataclass(frozen=True)
class Problem:
    """Why a clip is not in the dataset: one word for counting, and what happened."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Source:
    """A manifest line with the key its clip is stored under, or the problem that keeps it out."""

    clip: Clip
    captions: tuple[tuple[str, str], ...]
    """(type, cleaned text), none empty."""
    key: str
    """"" where there is a problem."""
    problem: Problem | None = None


@dataclass(frozen=True)
class StoredClip:
    """What the video record keeps of a clip: its index row without the captions."""

    key: str
    offset: int
    length: int
    xxh3: int
    thw: tuple[int, int, int]
    ratio_key: float


@dataclass(frozen=True)
class ChunkRecord:
    """chunks/<shard>.json: what a shard was made from, and what came of it."""

    made_from: str
    """sha256 over keys and metadata in order; equal where the shard need not be made again."""
    shard: ShardInfo
    rows: tuple[StoredClip, ...] = ()
    """Clips in the order of the tar (of a video shard)."""
    bad: Mapping[str, Problem] = field(default_factory=dict)
    """Keys that gave no sample."""
    contents: Mapping[str, tuple[int, int, str]] = field(default_factory=dict)
    """Media file -> size, mtime_ns and content hash, so that unchanged files need not be read again."""


def write_record(path: Path, record: ChunkRecord) -> None:
    """Write the record of a finished shard."""
    write_json(path, dataclasses.asdict(record))


def read_record(path: Path) -> ChunkRecord | None:
    """The record, or None where there is none that this release can read (the shard is then made again)."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(StoredClip(**{**row, "thw": tuple(row["thw"])}) for row in values["rows"])
        return ChunkRecord(values["made_from"], ShardInfo(**values["shard"]), rows,
                           {key: Problem(**problem) for key, problem in values["bad"].items()},
                           {name: tuple(entry) for name, entry in values["contents"].items()})
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def finished(record: ChunkRecord | None, made_from: str, folder: Path) -> bool:
    """Whether the shard of `record` is there, whole, and was made from just this."""
    if record is None or record.made_from != made_from:
        return False
    path = folder / record.shard.name
    return path.is_file() and path.stat().st_size == record.shard.bytes


def retire_shard(shard: Path, record_path: Path) -> None:
    """Call before a shard is made: the record of an old one, and a finished dataset that reads it, would not fit."""
    if shard.exists() or record_path.exists():
        retire_dataset(shard.parent)
        record_path.unlink(missing_ok=True)


def retire_dataset(folder: Path) -> None:
    """Call before anything changes that a finished dataset of this folder reads; it is finished again at the end."""
    (folder / DATASET_FILE).unlink(missing_ok=True)


def digest(parts: Sequence[object]) -> str:
    """sha256 (hex) of plain values, their boundaries included."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """xxh3_128 (hex) of a file's bytes. OSError where it cannot be read."""
    total = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BYTES):
            total.update(block)
    return total.hexdigest()


def clip_key(content: str, clip: Clip, settings: VideoSettings) -> str:
    """Key of a video sample (32 hex digits): content, range, everything the bits depend on.

    The bucket follows from content and latent side; clips are not flipped.
    """
    parts = [content, clip.begin_frame or 0, clip.end_frame, settings.fps, settings.max_frames, settings.latent_side,
             "unflipped", PREPROCESSING_VERSION, settings.rounds, settings.tokenizer]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def find_sources(clips: Sequence[Clip], settings: VideoSettings, known: Mapping[str, tuple[int, int, str]],
                 ) -> tuple[list[Source], dict[str, tuple[int, int, str]]]:
    """The clips with their keys, and the content hashes they came from. Reads files that `known` does not cover."""
    contents: dict[str, tuple[int, int, str]] = {}
    sources = []
    for clip in clips:
        captions = tuple(dict.fromkeys((kind, text) for kind, raw in clip.captions if (text := clean_caption(raw))))
        if not captions and clip.class_id is None:
            problem = Problem("empty_caption", "nothing is left of the caption once it is cleaned")
            sources.append(Source(clip, (), "", problem))
            continue
        try:
            content = _content(clip.path, known, contents)
        except OSError as error:
            reason = "missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "unreadable"
            problem = Problem(reason, f"{clip.path}: {error.strerror or error}")
            sources.append(Source(clip, captions, "", problem))
            continue
        sources.append(Source(clip, captions, clip_key(content, clip, settings)))
    return sources, contents


def _content(path: Path, known: Mapping[str, tuple[int, int, str]], contents: dict[str, tuple[int, int, str]]) -> str:
    name, status = str(path), path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    entry = contents.get(name) or known.get(name)
    if entry is None or entry[:2] != stamp:
        entry = (*stamp, content_hash(path))
    contents[name] = entry
    return entry[2]

"""Which clips a chunk of the manifest holds, and under which keys.

A chunk is a run of `tokenize.shard_samples` manifest lines; it becomes one video shard and one text shard. Everything
made of it is a pure function of its lines, its media files and the settings, whoever makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from grn_scale.data.manifest import Clip, ManifestError
from grn_scale.data.media_file import Media
from grn_scale.tokenizer.text import clean_caption

PREPROCESSING_VERSION = 1
"""Raised when decoding, resizing or normalisation change what the tokenizer sees."""
HASH_BYTES = 1 << 22

Contents = Mapping[str, tuple[int, int, str]]
"""Media file -> size, mtime_ns and content hash, so that unchanged files need not be read again."""


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
    """Why a manifest line is not in the dataset: one word for counting, and what happened."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Source:
    """A manifest line with the key its clip is stored under, or the problem that keeps it out."""

    line: int
    id: str
    path: str
    clip: Clip | None
    """None where the line itself is bad."""
    captions: tuple[tuple[str, str], ...] = ()
    """(type, cleaned text), none empty."""
    key: str = ""
    """"" where there is a problem."""
    problem: Problem | None = None


def digest(parts: Sequence[object]) -> str:
    """sha256 (hex) of plain values, their boundaries included."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def find_sources(lines: Sequence[Clip | ManifestError], settings: VideoSettings,
                 known: Contents) -> tuple[list[Source], dict[str, tuple[int, int, str]]]:
    """The lines with their keys, and the content hashes these came from. Reads files that `known` does not cover."""
    contents: dict[str, tuple[int, int, str]] = {}
    return [_source(line, settings, known, contents) for line in lines], contents


def distinct(sources: Sequence[Source]) -> dict[str, Source]:
    """Key -> the first line with it, for the lines that give a clip."""
    found: dict[str, Source] = {}
    for source in sources:
        if source.key:
            found.setdefault(source.key, source)
    return found


def made_from(sources: Mapping[str, Source]) -> str:
    """Equal where a video shard of these clips need not be made again."""
    return digest([[key, source.id, source.clip.class_id] for key, source in sources.items()])


def clip_key(content: str, clip: Clip, settings: VideoSettings) -> str:
    """Key of a video sample (32 hex digits): content, range, flip, everything the bits depend on.

    The bucket follows from content and latent side.
    """
    parts = [content, clip.begin_frame or 0, clip.end_frame, settings.fps, settings.max_frames, settings.latent_side,
             "flipped" if clip.flip else "unflipped", PREPROCESSING_VERSION, settings.rounds, settings.tokenizer]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _source(line: Clip | ManifestError, settings: VideoSettings, known: Contents,
            contents: dict[str, tuple[int, int, str]]) -> Source:
    if isinstance(line, ManifestError):
        return Source(line.line, "", "", None, problem=Problem(line.reason, str(line)))
    about = line.line, line.id, str(line.path)
    captions = tuple(dict.fromkeys((kind, text) for kind, raw in line.captions if (text := clean_caption(raw))))
    if line.captions and not captions and line.class_id is None:
        return Source(*about, line, problem=Problem("empty_caption", "nothing is left of the caption once it is "
                                                                     "cleaned"))
    try:
        return Source(*about, line, captions, clip_key(_content(line, known, contents), line, settings))
    except ValueError as error:  # a zero byte, or what no file name can hold
        return Source(*about, line, captions, problem=Problem("unreadable", f"{str(line.path)!r}: {error}"))
    except OSError as error:
        reason = "missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "unreadable"
        return Source(*about, line, captions, problem=Problem(reason, f"{line.path}: {error.strerror or error}"))


def _content(clip: Clip, known: Contents, contents: dict[str, tuple[int, int, str]]) -> str:
    """xxh3_128 (hex) of the bytes of a clip's file. OSError where it cannot be read."""
    media = Media(str(clip.path), clip.member)
    name, stamp = str(media), media.stamp()
    entry = contents.get(name) or known.get(name)
    if entry is None or tuple(entry[:2]) != stamp:
        total = xxhash.xxh3_128()
        with media.open() as stream:
            while block := stream.read(HASH_BYTES):
                total.update(block)
        entry = (*stamp, total.hexdigest())
    contents[name] = tuple(entry)
    return entry[2]

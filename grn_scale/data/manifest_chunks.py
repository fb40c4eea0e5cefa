"""A manifest cut into runs of lines that can be read by themselves, from their byte offsets: the work of a fleet.

Each worker reads its chunks only. A chunk carries the checksum of its bytes, so that a manifest which changed since
it was cut is noticed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from grn_scale.data.manifest import Clip, ManifestError, is_blank, no_clip, parse_line, reading, split_lines


@dataclass(frozen=True)
class ManifestChunk:
    """A run of whole lines of a manifest."""

    offset: int
    """Byte of the manifest at which it starts."""
    bytes: int
    first_line: int
    """Number of its first line, from 1; blank lines count."""
    clips: int
    """Lines that are not blank, good ones and bad ones."""
    sha256: str
    """Hex, of its bytes."""


class _Run:
    """The chunk that is being collected."""

    def __init__(self, offset: int, first_line: int):
        self.offset, self.first_line = offset, first_line
        self.bytes = self.clips = 0
        self._digest = hashlib.sha256()

    def see(self, part: bytes) -> None:
        self.bytes += len(part)
        self._digest.update(part)

    def chunk(self) -> ManifestChunk:
        return ManifestChunk(self.offset, self.bytes, self.first_line, self.clips, self._digest.hexdigest())


def chunk_manifest(path: str | Path, clips: int) -> list[ManifestChunk]:
    """The chunks of a manifest in order: `clips` lines that are not blank in each, what is left in the last.

    Reads the manifest once and keeps no line of it. Blank lines at its end belong to no chunk.
    Raises ManifestError where it cannot be read or has no line.
    """
    if clips < 1:
        raise ValueError(f"chunks of {clips} clips were asked for, but each must hold at least 1")
    file = Path(path).absolute()
    chunks: list[ManifestChunk] = []
    run = _Run(0, 1)
    with reading(file) as stream:
        for number, raw in enumerate(split_lines(stream, lambda part: run.see(part)), start=1):
            run.clips += not is_blank(raw)
            if run.clips == clips:
                chunks.append(run.chunk())
                run = _Run(run.offset + run.bytes, number + 1)
    if run.clips:
        chunks.append(run.chunk())
    if not chunks:
        raise no_clip(file)
    return chunks


def read_chunk(path: str | Path, chunk: ManifestChunk, *, allow_empty_captions: bool = False,
               ) -> list[Clip | ManifestError]:
    """One entry a line of the chunk that is not blank, in order: the clip, or the error of a line that gives none.

    Raises ManifestError where the manifest cannot be read, or is not the one that was cut.
    """
    file = Path(path).absolute()
    read = _Run(chunk.offset, chunk.first_line)
    entries: list[Clip | ManifestError] = []
    with reading(file) as stream:
        stream.seek(chunk.offset)
        for number, raw in enumerate(split_lines(stream, read.see), start=chunk.first_line):
            if not is_blank(raw):
                read.clips += 1
                try:
                    entries.append(parse_line(raw, file, number, allow_empty_captions=allow_empty_captions))
                except ManifestError as error:
                    entries.append(error)
            if read.bytes >= chunk.bytes:
                break
    if read.chunk() != chunk:
        raise ManifestError(file, 0, "changed", f"lines {chunk.first_line} and on are not those this run began with; "
                                                "put the manifest back as it was, or start again with the new one")
    return entries

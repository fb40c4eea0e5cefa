"""A tar of the dataset read from front to back, in large pieces, from a folder or from object storage.

Only headers that `grn_scale.data.shard_writer` writes are accepted, byte by byte: any other is damage, and no other
reading of it is tried.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from grn_scale.data.shard_writer import BLOCK
from grn_scale.storage import Storage

PIECE = 8 * 2**20
"""Bytes asked for at a time."""


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    key: str
    suffix: str
    offset: int
    """Of its first byte in the tar."""
    data: bytes


class ShardStream:
    """The bytes of one tar in order. FileNotFoundError where there is none."""

    def __init__(self, storage: Storage, name: str):
        self._storage, self._name = storage, name
        self._size = storage.size(name)
        self._piece = memoryview(b"")
        self._fetched = 0
        self._sha256 = hashlib.sha256()
        self.bytes = 0
        """Read so far."""

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end. OSError where they cannot be read."""
        found = []
        while size and self._fetch():
            found.append(self._piece[:size])
            self._piece = self._piece[len(found[-1]):]
            size -= len(found[-1])
            self.bytes += len(found[-1])
        return b"".join(found)

    def finish(self) -> tuple[int, str]:
        """Bytes and sha256 (hex) of the whole tar, after reading what is left of it."""
        while self.read(PIECE):
            continue
        return self.bytes, self._sha256.hexdigest()

    def _fetch(self) -> bool:
        """Whether there is something to read, after fetching a piece where that is due."""
        if not self._piece and self._fetched < self._size:
            data = self._storage.read_range(self._name, self._fetched, PIECE)
            self._fetched = self._fetched + len(data) if data else self._size
            self._sha256.update(data)
            self._piece = memoryview(data)
        return bool(self._piece)


def read_members(stream: ShardStream) -> Iterator[Member]:
    """The files of a tar. ValueError at the first byte that a shard would not have there, OSError from the storage."""
    while (header := stream.read(BLOCK)) != bytes(BLOCK):
        start = stream.bytes - len(header)
        name, size = _name_and_size(header, start)
        data = stream.read(size)
        if len(data) < size:
            raise ValueError(f"it ends after {len(data)} of the {size} bytes of {name}")
        stream.read(-size % BLOCK)
        key, _, suffix = name.partition(".")
        yield Member(key, suffix, start + BLOCK, data)
    if stream.read(BLOCK + 1) != bytes(BLOCK):
        raise ValueError(f"it does not end behind its last file, at byte {stream.bytes}")


def _name_and_size(header: bytes, start: int) -> tuple[str, int]:
    if len(header) < BLOCK:
        raise ValueError(f"it ends at byte {start + len(header)}, before its closing blocks")
    try:
        member = tarfile.TarInfo(header[:100].rstrip(b"\0").decode())
        member.size, member.mode = int(header[124:136].rstrip(b"\0"), 8), 0o644
        if member.tobuf(tarfile.USTAR_FORMAT) == header:
            return member.name, member.size
    except ValueError as error:
        raise ValueError(f"no file of the format begins at byte {start}: {error}") from error
    raise ValueError(f"no file of the format begins at byte {start}: its header is not one that was written there")

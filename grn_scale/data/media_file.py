"""Media files as read-only streams: files of their own, and members of a tar, read where they lie.

A tar's table of members is made once and kept as long as the file does not change; nothing is ever unpacked.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from grn_scale.data.recent import Recent


@dataclass(frozen=True)
class Media:
    """A media file, or a media file in a tar."""

    path: str
    member: str | None = None
    """Name in the tar `path`, letter by letter as the tar lists it; None: `path` itself is the media file."""

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"

    @property
    def suffix(self) -> str:
        """Lower-case ending of the name, with its dot; "" for none."""
        return os.path.splitext(self.path if self.member is None else self.member)[1].lower()

    def stamp(self) -> tuple[int, int]:
        """(size, mtime_ns) of the file on disk: while both stay the same, so do its contents. OSError as `open`."""
        status = _status(self.path)
        return status.st_size, status.st_mtime_ns

    def open(self) -> BinaryIO:
        """The bytes as a seekable, read-only stream.

        FileNotFoundError where there is no such regular file, or no such member; another OSError where it cannot be
        read, the tar is damaged before the member, or the tar is compressed.
        """
        status = _status(self.path)
        if self.member is None:
            return open(self.path, "rb")
        key = self.path, status.st_size, status.st_mtime_ns
        offset, size = _TABLES.get(key, lambda _: _read_table(self.path)).find(self.path, self.member)
        # A member that goes on behind the end of a cut tar ends there, as a cut file does.
        return io.BufferedReader(_Range(self.path, self.member, offset, max(0, min(size, status.st_size - offset))),
                                 BUFFER_BYTES)


def open_media(path: str | Path, member: str | None = None) -> BinaryIO:
    """The bytes of a file, or of a member of the tar `path`, as a seekable, read-only stream.

    Raises OSError as `Media.open` does: FileNotFoundError where there is no such file or member.
    """
    return Media(os.fspath(path), member).open()


def _status(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except (NotADirectoryError, ValueError) as error:  # a file where a folder should be; a zero byte in the name
        raise FileNotFoundError(f"{path!r} is no file: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{path} is no file")
    return status


BUFFER_BYTES = 1 << 18


class _Range(io.RawIOBase):
    """`size` bytes of a file from `offset` on."""

    def __init__(self, path: str, name: str, offset: int, size: int):
        self._file = open(path, "rb", buffering=0)
        self.name = name
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"{self.name}: cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        left = max(0, self._size - self._position)
        count = os.preadv(self._file.fileno(), [memoryview(buffer)[:left]], self._offset + self._position)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class _Table:
    """Regular files of a tar."""

    places: Mapping[str, tuple[int, int]]
    """Name -> byte offset and size; of members with one name the last, as tar extracts them."""
    damage: str
    """Why the table ends early; "" where the tar was read to its end."""

    def find(self, path: str, member: str) -> tuple[int, int]:
        if member in self.places:
            return self.places[member]
        if self.damage:
            raise OSError(f"{path} is no tar, a compressed one, or damaged behind {len(self.places)} files "
                          f"({self.damage}), and {member!r} is not found in it")
        raise FileNotFoundError(f"{path} holds no file {member!r}")


def _read_table(path: str) -> _Table:
    places: dict[str, tuple[int, int]] = {}
    damage, reached = "", 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps every header: a gigabyte for a million files
                if info.size < 0 or info.offset_data <= reached:  # a damaged size, which may lead round in circles
                    raise tarfile.ReadError("bad size in a header")
                reached = info.offset_data
                if info.isreg() and not info.issparse():
                    places[info.name] = info.offset_data, info.size
            # tarfile takes a damaged header behind the first for the end, which is a block of zeros.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                damage = "bad header"
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:  # whatever a bad header leads to
        damage = str(error)
    return _Table(places, damage)


_TABLES: Recent[tuple[str, int, int], _Table] = Recent(8)

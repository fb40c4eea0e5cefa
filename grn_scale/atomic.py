"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from grn_scale.errors import UserError

BLOCK_BYTES = 1 << 20
PARTIAL = ".partial"
"""Ends the name of what is still being written."""
_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<host>[A-Za-z0-9-]*)-(?P<pid>\d+)-\d+" + re.escape(PARTIAL))
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
_writes = itertools.count()
DISK_FULL = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is spent",
             errno.EFBIG: "the file size limit is reached"}


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Binary stream that becomes `path` when the block ends; after an error nothing of it is left.

    Written under a name of this writer's own in the same folder, flushed to the disk (unless not `durable`: then a
    power cut may lose it), then renamed: a reader, or a run after a kill, sees the old file or a whole new one, also
    where several processes on several machines write the same file. Raises UserError where the disk is full.
    """
    path = Path(path)
    temporary = partial_name(path)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # whatever ends the write, also Ctrl-C, no half-written file may stay; raised again
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"cannot write {path}: {DISK_FULL[error.errno]}; the unfinished file is removed and "
                            "finished ones are kept: free space, then run the same command again") from error
        raise


def partial_name(path: Path) -> Path:
    """A name beside `path` for what becomes it once it is complete, of this writer alone."""
    return path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{next(_writes)}{PARTIAL}")


def intended_name(name: str) -> str:
    """Name that a file was to get which a killed writer left behind; any other name as it is."""
    leftover = _LEFTOVER.fullmatch(name)
    return leftover["name"] if leftover else name


def remove_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove what writers of this machine that were killed left in a folder, files and folders; other machines' stay.

    name: what they were to become; None: anything.
    """
    for path in Path(folder).glob(f"*{PARTIAL}"):
        leftover = _LEFTOVER.fullmatch(path.name)
        if (leftover and name in (None, leftover["name"]) and leftover["host"] == _HOST
                and not _alive(int(leftover["pid"]))):
            remove_partial(path)


def remove_partial(path: Path) -> None:
    """Remove what a writer did not finish, a file or a folder; nothing where it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def append_line(path: str | Path, line: str) -> None:
    """Add a line to the file `path`, which is made where it is missing. Raises UserError where the disk is full.

    A kill, or a disk that fills up in the middle, may leave a part of the line: `drop_unfinished_line` cuts it off.
    """
    data = memoryview(f"{line}\n".encode())
    try:
        with open(path, "ab", buffering=0) as file:
            while data:
                data = data[file.write(data):]
    except OSError as error:
        if error.errno in DISK_FULL:
            raise UserError(f"cannot write {path}: {DISK_FULL[error.errno]}; free space, then start again: what is "
                            "finished is kept") from error
        raise


def drop_unfinished_line(path: str | Path) -> None:
    """Cut off what stands behind the last line break of a file; nothing where there is no file."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            last = file.read(end - begin).rfind(b"\n")
            if last >= 0:
                end = begin + last + 1
                break
            end = begin
        if end < size:
            file.truncate(end)


def write_bytes(path: str | Path, data: bytes, *, durable: bool = True) -> None:
    """`data` as the whole file `path`, atomically."""
    with atomic_file(path, durable=durable) as stream:
        stream.write(data)


def write_json(path: str | Path, value: Any, *, indent: int | None = 1) -> None:
    """`value` as JSON in the file `path`, atomically. ValueError for NaN and infinity, which JSON has not."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())

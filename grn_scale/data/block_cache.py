"""Blocks of remote shards: in memory, or on a local disk that the processes of a machine share.

On disk a block is a file whose name says which bytes of which shard it holds, so there is nothing to keep in step
between processes: a file that is there is right as far as anyone knows, and every reader checks what it takes from it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from grn_scale.atomic import PARTIAL, intended_name, write_bytes
from grn_scale.config.data_schema import DataConfig
from grn_scale.data.recent import Recent
from grn_scale.errors import ConfigError, UserError

log = logging.getLogger(__name__)

MEMORY_BLOCKS = 64
FETCH_LOCKS = 64
"""Blocks that may be fetched at a time; a block is fetched by one thread, and the others wait for it."""
LOOKS = 256
"""A process looks at the size of the cache whenever it has added this part of the bound."""
MOST, KEPT = 0.9, 0.75
"""Parts of the bound: above the first, the oldest blocks go until the second is left. What the other processes may
have added meanwhile fits above the first, up to 25 of them."""
USED_SECONDS = 60
"""How finely the time of a block's last use is kept."""
STALE_SECONDS = 3600
"""Age at which an unfinished block was left behind by a killed process."""
_BLOCK_NAME = re.compile(r"[0-9a-f]{32}-\d{6}")
_FOLDER_NAME = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Block:
    """Names bytes that never change, as a shard never does."""

    location: str
    """Of the dataset."""
    sha256: str
    """Of the shard."""
    number: int
    size: int


class Blocks(Protocol):
    """Where fetched blocks are kept; several threads may read."""

    def read(self, block: Block, start: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        """`length` bytes of a block from `start` on, fewer where it ends; `fetch` gives a block that is not here."""

    def drop(self, block: Block) -> None:
        """Forget a block that turned out to be wrong."""


class MemoryBlocks:
    """The blocks used last, for this process alone."""

    def __init__(self) -> None:
        self._blocks: Recent[Block, bytes] = Recent(MEMORY_BLOCKS)
        self._locks = [threading.Lock() for _ in range(FETCH_LOCKS)]

    def read(self, block: Block, start: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        with self._locks[hash(block) % FETCH_LOCKS]:
            data = self._blocks.get(block, lambda _: fetch())
        return data[start : start + length]

    def drop(self, block: Block) -> None:
        self._blocks.drop(block)


class DiskBlocks:
    """A folder that holds at most `limit` bytes in blocks; those not used for longest go first."""

    def __init__(self, folder: str | Path, limit: int):
        """Makes the folder and its lock files. ConfigError where that fails."""
        self.folder = Path(folder)
        self.limit = limit
        self._locks = self.folder / "locks"
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            for name in ("shrink", *map(str, range(FETCH_LOCKS))):
                (self._locks / name).touch()
        except OSError as error:
            raise ConfigError(f"data.cache_dir is {folder}, which cannot be used: {error.strerror or error}; name a "
                              "folder on a local disk that may be written, or leave it empty") from error
        self._lock = threading.Lock()
        self._added = limit  # an earlier run may have left more than this one allows: look at the first addition
        self._failed = False

    @classmethod
    def of(cls, data: DataConfig) -> DiskBlocks | None:
        """The cache that a configuration asks for, if any."""
        return cls(data.cache_dir, round(data.cache_gigabytes * 1e9)) if data.cache_dir else None

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.limit)

    def read(self, block: Block, start: int, length: int, fetch: Callable[[], bytes]) -> bytes:
        path = self._path(block)
        data = self._found(path, block.size, start, length)
        if data is None:
            with self._fetching(block):
                data = self._found(path, block.size, start, length)
                if data is None:
                    whole = fetch()
                    if len(whole) == block.size:
                        self._keep(path, whole)
                    data = whole[start : start + length]
        return data

    def drop(self, block: Block) -> None:
        self._path(block).unlink(missing_ok=True)

    def _path(self, block: Block) -> Path:
        dataset = xxhash.xxh3_128_hexdigest(block.location.encode())
        return self.folder / dataset / f"{block.sha256[:32]}-{block.number:06d}"

    def _found(self, path: Path, size: int, start: int, length: int) -> bytes | None:
        """Bytes of a block, which now counts as used; None where it is not here, whole and readable."""
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != size:
                    return None
                if time.time() - status.st_mtime > USED_SECONDS:
                    os.utime(file.fileno())
                return os.pread(file.fileno(), length, start)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("a cached block is left aside: %s", error)
            return None

    @contextmanager
    def _fetching(self, block: Block) -> Iterator[None]:
        """For one thread of one process of this machine at a time (a killed one lets go by itself)."""
        with open(self._locks / str((int(block.sha256[:8], 16) + block.number) % FETCH_LOCKS), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _keep(self, path: Path, data: bytes) -> None:
        # A disk that is full or fails costs the cache, not the run.
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, data, durable=False)
        except (OSError, UserError) as error:
            if not self._failed:
                log.warning("blocks of remote shards cannot be kept, so they are fetched again and again: %s", error)
            self._failed = True
            return
        with self._lock:
            self._added += len(data)
            if self._added < self.limit / LOOKS:
                return
            self._added = 0
        self.shrink()

    def shrink(self) -> None:
        """Remove the blocks not used for longest, if there are too many."""
        with open(self._locks / "shrink", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            blocks = sorted(self._blocks())
            held = sum(size for _, size, _ in blocks)
            if held <= self.limit * MOST:
                return
            for _, size, path in blocks:
                path.unlink(missing_ok=True)
                held -= size
                if held <= self.limit * KEPT:
                    return

    def _blocks(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and file of every block. What killed processes left is removed on the way, and files
        of others are left alone."""
        for folder in self.folder.iterdir():
            if not _FOLDER_NAME.fullmatch(folder.name) or not folder.is_dir():
                continue
            for path in folder.iterdir():
                if not _BLOCK_NAME.fullmatch(intended_name(path.name)):
                    continue
                try:
                    status = path.stat()
                except FileNotFoundError as error:
                    log.debug("another process was faster: %s", error)
                    continue
                if not path.name.endswith(PARTIAL):
                    yield status.st_mtime_ns, status.st_size, path
                elif time.time() - status.st_mtime > STALE_SECONDS:
                    path.unlink(missing_ok=True)

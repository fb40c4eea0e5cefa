"""Bytes of shards by offset: straight from a local file, or through blocks of a remote one.

The payloads of a step lie scattered over the shards of a window. Locally each is one read. Remotely a request costs
far more than its bytes, so whole blocks are fetched and kept: the neighbours of a payload are wanted soon.
"""

from __future__ import annotations

import math
import os
from typing import BinaryIO, Protocol

import numpy as np

from grn_scale.data.block_cache import Block, Blocks, MemoryBlocks
from grn_scale.data.recent import Recent
from grn_scale.data.schema import ShardInfo
from grn_scale.storage import LocalStorage, Storage, retried

OPEN_FILES = 64
BLOCK = 4 * 2**20
"""Bytes fetched together, from multiples of this on."""
LARGE = BLOCK // 4
"""Without a cache on disk payloads from this size on are fetched alone: memory cannot hold their neighbours."""


class Payloads(Protocol):
    """Where the bytes of a dataset's shards come from; several threads may read."""

    def read(self, shard: ShardInfo, offset: int, length: int) -> np.ndarray:
        """uint8 [length], fewer where the file ends; writable. OSError where it cannot be read."""

    def forget(self, shard: ShardInfo, offset: int, length: int) -> bool:
        """Drop what is kept of these bytes, because they are wrong; False where nothing is kept of them."""


def open_payloads(storage: Storage, cache: Blocks | None = None) -> Payloads:
    """The payloads of a dataset; `cache` keeps blocks of a remote one."""
    return LocalPayloads(storage) if isinstance(storage, LocalStorage) else RemotePayloads(storage, cache)


class LocalPayloads:
    """Reads at an offset of an open file, retried. (Of a mapping a failing disk would end the process.)"""

    def __init__(self, storage: LocalStorage):
        self._storage = storage
        self._files: Recent[str, BinaryIO] = Recent(OPEN_FILES)

    def read(self, shard: ShardInfo, offset: int, length: int) -> np.ndarray:
        return retried(self._storage / shard.name, lambda: self._read(shard, offset, length))

    def _read(self, shard: ShardInfo, offset: int, length: int) -> np.ndarray:
        data = np.empty(length, np.uint8)
        file = self._files.get(shard.name, self._open)
        try:
            read = os.preadv(file.fileno(), (data,), offset)
            while read < length and (count := os.preadv(file.fileno(), (data[read:],), offset + read)):
                read += count
        except OSError:
            self._files.drop(shard.name)  # a handle that went stale stays so: the next attempt opens the file anew
            raise
        return data if read == length else data[:read]

    def forget(self, shard: ShardInfo, offset: int, length: int) -> bool:
        return False

    def _open(self, name: str) -> BinaryIO:
        return open(self._storage.path(name), "rb", buffering=0)


class RemotePayloads:
    """Ranged reads of whole blocks, which are kept on disk where there is a cache, and else in memory."""

    def __init__(self, storage: Storage, cache: Blocks | None):
        self._storage = storage
        self._blocks = cache or MemoryBlocks()
        self._alone = math.inf if cache else LARGE
        """Length from which a payload is fetched by itself."""

    def read(self, shard: ShardInfo, offset: int, length: int) -> np.ndarray:
        if length >= self._alone:
            return np.frombuffer(bytearray(self._storage.read_range(shard.name, offset, length)), np.uint8)
        data = bytearray()
        while len(data) < length:
            number, start = divmod(offset + len(data), BLOCK)
            block = self._block(shard, number)
            piece = self._blocks.read(block, start, length - len(data), lambda: self._fetch(shard, block))
            data += piece
            if start + len(piece) < BLOCK:
                break
        return np.frombuffer(data, np.uint8)

    def forget(self, shard: ShardInfo, offset: int, length: int) -> bool:
        if length >= self._alone:
            return False
        for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
            self._blocks.drop(self._block(shard, number))
        return True

    def _block(self, shard: ShardInfo, number: int) -> Block:
        size = max(0, min(BLOCK, shard.bytes - number * BLOCK))
        return Block(self._storage.location, shard.sha256, number, size)

    def _fetch(self, shard: ShardInfo, block: Block) -> bytes:
        return self._storage.read_range(shard.name, block.number * BLOCK, block.size)

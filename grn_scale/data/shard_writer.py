"""Token shards: tars that are written once, whole and reproducibly.

A tar holds uncompressed members with fixed headers, so the same samples give the same bytes, plain webdataset can
stream it, and a sample is one read at the offset the index gives.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from grn_scale.data.index_parts import Payload
from grn_scale.data.schema import ShardInfo, TextRow
from grn_scale.storage import Storage

BLOCK = 512
"""Tar headers and payloads start at multiples of this."""


class ShardWriter:
    """Members of one tar. Made by `write_shard`; `info` is complete when its block has ended."""

    def __init__(self, name: str, stream: BinaryIO):
        self.info = ShardInfo(name, 0, 0, "")
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._keys: set[str] = set()

    def add_video(self, key: str, bits: bytes, about: dict[str, Any]) -> Payload:
        """Append a clip: <key>.bits, then <key>.json with `about` and the checksums of the bits."""
        self._begin(key)
        payload = self._payload(f"{key}.bits", bits)
        self._member(f"{key}.json", _json_bytes(
            {**about, "xxh3": f"{payload.xxh3:016x}", "sha256": hashlib.sha256(bits).hexdigest()}))
        return payload

    def add_text(self, key: str, ids: Sequence[int], states: bytes | None = None) -> TextRow:
        """Append a caption: <key>.json with its token ids, then <key>.states where its states are cached.

        states: what `text_payload.pack_states` gives, in the form that `DatasetInfo.text_states` names.
        """
        self._begin(key)
        written = self._payload(f"{key}.json", _json_bytes({"ids": list(ids)}))
        cached = Payload(0, 0, 0) if states is None else self._payload(f"{key}.states", states)
        return TextRow(key, len(ids), written.offset, written.length, written.xxh3,
                       cached.offset, cached.length, cached.xxh3)

    def _begin(self, key: str) -> None:
        if "." in key or "/" in key or key in self._keys:
            raise ValueError(f"key {key!r} holds a dot or slash, or is in the shard already")
        self._keys.add(key)

    def _payload(self, name: str, data: bytes) -> Payload:
        return Payload(self._member(name, data), len(data), xxhash.xxh3_64_intdigest(data))

    def _member(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % BLOCK))
        return offset

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self._position += len(data)

    def _finish(self) -> None:
        self._write(bytes(2 * BLOCK))
        self.info = ShardInfo(self.info.name, len(self._keys), self._position, self._sha256.hexdigest())


@contextmanager
def write_shard(path: str | Path) -> Iterator[ShardWriter]:
    """Writer of the tar `path` (or URL), which appears when the block ends and not at all after an error.

    Raises UserError where the disk is full.
    """
    storage, name = Storage.of_file(path)
    with storage.write(name) as stream:
        writer = ShardWriter(name, stream)
        yield writer
        writer._finish()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

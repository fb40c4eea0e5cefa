"""A storage that counts what is asked of it, to say what a fleet costs a file system that all share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from grn_scale.storage import LocalStorage


class CountingStorage(LocalStorage):
    """A local folder; `calls` counts the operations by kind, `listed` the entries that listings gave."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.calls: Counter[str] = Counter()
        self.listed = 0

    def taken(self) -> dict[str, int]:
        """Calls since the last time that this was asked."""
        calls, self.calls = self.calls, Counter()
        return dict(calls)

    def read(self, name: str) -> bytes:
        self.calls["read"] += 1
        return super().read(name)

    def size(self, name: str) -> int:
        self.calls["size"] += 1
        return super().size(name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        self.calls["list"] += 1
        found = super().sizes(prefix)
        self.listed += len(found)
        return found

    def names(self, prefix: str = "") -> list[str]:
        self.calls["list"] += 1
        found = super().names(prefix)
        self.listed += len(found)
        return found

    def write(self, name: str) -> Any:
        self.calls["write"] += 1
        return super().write(name)

    def write_bytes(self, name: str, data: bytes) -> None:
        self.calls["write"] += 1
        super().write_bytes(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self.calls["create"] += 1
        return super().create(name, data)

    def delete(self, name: str) -> None:
        self.calls["delete"] += 1
        super().delete(name)

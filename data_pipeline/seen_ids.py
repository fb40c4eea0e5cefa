"""Which ids a manifest has had, and in which line, in 12 bytes an id and a little: 10^8 lines take about 1.5 GB."""

from __future__ import annotations

import numpy as np
import xxhash

PART_BITS = 12
WAITING_SHARE = 32
"""Of a part, the share of ids that may wait in a dictionary before they are sorted in: bounds memory and sorting."""
LEAST_WAITING = 16


class SeenIds:
    """Line of the first occurrence of every id. Ids are told apart by 64 bits of their hash: with 10^8 of them the
    probability that any two are taken for one is 0.03 %.
    """

    def __init__(self) -> None:
        # Split by the first bits of the hash: sorting ids in moves one small part at a time.
        parts = 1 << PART_BITS
        self._hashes = [np.empty(0, np.uint64)] * parts
        self._lines = [np.empty(0, np.uint32)] * parts
        self._waiting: list[dict[int, int]] = [{} for _ in range(parts)]

    def first_line(self, name: str, line: int) -> int:
        """Line in which the id `name` stood first: `line` itself where it is new, and then it is remembered."""
        value = xxhash.xxh3_64_intdigest(name.encode())
        part = value >> (64 - PART_BITS)
        hashes, waiting = self._hashes[part], self._waiting[part]
        place = int(hashes.searchsorted(np.uint64(value)))
        if place < len(hashes) and int(hashes[place]) == value:
            return int(self._lines[part][place])
        first = waiting.setdefault(value, line)
        if len(waiting) > LEAST_WAITING + len(hashes) // WAITING_SHARE:
            self._sort_in(part)
        return first

    def _sort_in(self, part: int) -> None:
        waiting = self._waiting[part]
        hashes = np.concatenate((self._hashes[part], np.fromiter(waiting.keys(), np.uint64, len(waiting))))
        lines = np.concatenate((self._lines[part], np.fromiter(waiting.values(), np.uint32, len(waiting))))
        order = np.argsort(hashes, kind="stable")
        self._hashes[part], self._lines[part] = hashes[order], lines[order]
        waiting.clear()

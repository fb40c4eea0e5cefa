"""The end of a file that may be large and may be growing."""

from __future__ import annotations

import os
from pathlib import Path

BLOCK_BYTES = 1 << 16


def last_bytes(path: Path, most: int) -> bytes:
    """The last `most` bytes of a file at most, from the beginning of a line on where that leaves a line."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most))
        data = file.read(most)
    if size <= most:
        return data
    _, line_break, rest = data.partition(b"\n")
    return rest if line_break and rest else data


def begin_of_last_lines(path: Path, count: int) -> int:
    """Offset at which the last `count` lines of a file begin; 0 for a count of 0, which is all of them."""
    if count == 0:
        return 0
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        missing, position = count + 1, end  # the line break before them
        if end:
            file.seek(end - 1)
            missing -= file.read(1) != b"\n"  # an unfinished line has none of its own
        while position:
            begin = max(0, position - BLOCK_BYTES)
            file.seek(begin)
            block = file.read(position - begin)
            breaks = block.count(b"\n")
            if breaks >= missing:
                at = len(block)
                for _ in range(missing):
                    at = block.rindex(b"\n", 0, at)
                return begin + at + 1
            missing -= breaks
            position = begin
    return 0

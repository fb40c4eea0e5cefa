"""An index held in memory, as plans take it: clips and images of mixed size with captions of mixed length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from grn_scale.data.schema import Caption, IndexRow, TextRef

EMPTY_TEXT = TextRef("empty", 1)


@dataclass(frozen=True)
class MemoryIndex:
    shards: tuple[tuple[IndexRow, ...], ...]
    snapshot: str = "memory"

    @property
    def shard_sizes(self) -> list[int]:
        return [len(shard) for shard in self.shards]

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(empty_text=EMPTY_TEXT)

    def rows(self, shard: int) -> list[IndexRow]:
        return list(self.shards[shard])

    @property
    def keys(self) -> list[str]:
        return [row.key for shard in self.shards for row in shard]


def make_row(shard: int, row: int, thw: tuple[int, int, int], texts: Sequence[int]) -> IndexRow:
    """Clip number `row` with a caption of each length in `texts`; its I2V entries are one token longer."""
    captions = tuple(
        Caption("long", {task: TextRef(f"text-{row}-{i}-{task}", tokens + (task == "I2V"))
                         for task in ("T2I", "T2V", "I2V")})
        for i, tokens in enumerate(texts))
    return IndexRow(shard, row, f"clip{row:06d}", 0, 0, 0, thw, 1.0, captions)


def make_index(shards: int = 6, samples: int = 40, snapshot: str = "memory") -> MemoryIndex:
    """Images and videos of 17 to 600 tokens, with one to three captions."""
    rng = random.Random(0)
    rows = [
        make_row(n // samples, n, (rng.choice((1, 1, 2, 3, 5)), rng.choice((4, 6, 8)), rng.choice((4, 8, 12))),
                 [rng.randrange(2, 100) for _ in range(rng.randrange(1, 4))])
        for n in range(shards * samples)]
    return MemoryIndex(tuple(tuple(rows[i:i + samples]) for i in range(0, len(rows), samples)), snapshot)

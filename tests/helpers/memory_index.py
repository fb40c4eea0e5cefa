"""An index held in memory, as plans take it: clips and images of mixed size with captions of mixed length."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from grn_scale.batch import TASKS
from grn_scale.data.columns import KEY_DTYPE, ShardColumns, key_hashes
from grn_scale.data.schema import Caption, DatasetInfo, IndexRow, ShardInfo, TextRef

EMPTY_TEXT = TextRef("empty", 1, "text-000000.tar")


@dataclass(frozen=True)
class MemoryIndex:
    """Shards of rows; `settings` are fields of its DatasetInfo that differ from the usual ones."""

    shards: tuple[tuple[IndexRow, ...], ...]
    snapshot: str = "memory"
    settings: dict = field(default_factory=dict)

    @functools.cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(**{
            "format_version": 2, "tokenizer_fingerprint": "tokenizer", "latent_channels": 4, "rounds": 2,
            "text_fingerprint": "text", "text_hidden_size": 6, "text_states": "bf16", "task_tags": True,
            "empty_text": EMPTY_TEXT, "fps": 16.0,
            "video_shards": tuple(map(self._shard_info, range(len(self.shards)))), "text_shards": (),
            "samples": len(self.keys), "snapshot": self.snapshot, **self.settings})

    def columns(self, shard: int) -> ShardColumns:
        rows = self.shards[shard]
        keys = np.array([row.key.encode() for row in rows], KEY_DTYPE)
        captions = [caption for row in rows for caption in row.captions]
        return ShardColumns(
            keys, key_hashes(keys), np.array([row.thw for row in rows], np.int32).reshape(-1, 3),
            np.array([row.ratio_key for row in rows], np.float64), np.full(len(rows), -1),
            np.cumsum([0, *(len(row.captions) for row in rows)]),
            np.array([[c.texts[task].tokens if task in c.texts else 0 for task in TASKS] for c in captions],
                     np.int32).reshape(-1, len(TASKS)))

    @property
    def keys(self) -> list[str]:
        return [row.key for shard in self.shards for row in shard]

    @property
    def rows(self) -> dict[str, IndexRow]:
        return {row.key: row for shard in self.shards for row in shard}

    def _shard_info(self, shard: int) -> ShardInfo:
        rows = self.shards[shard]
        tokens = [np.prod(row.thw).item() for row in rows]
        texts = [max([EMPTY_TEXT.tokens, *(ref.tokens for c in row.captions for ref in c.texts.values())])
                 for row in rows]
        return ShardInfo(f"video-{shard:06d}.tar", len(rows), 0, "", images=sum(row.thw[0] == 1 for row in rows),
                         tokens=sum(tokens), longest=max((a + b + 1 for a, b in zip(tokens, texts)), default=0))


def make_row(shard: int, row: int, thw: tuple[int, int, int], texts: Sequence[int], name: str = "clip") -> IndexRow:
    """Clip number `row` with a caption of each length in `texts`; its I2V entries are one token longer."""
    captions = tuple(
        Caption("long", {task: TextRef(f"text-{row}-{i}-{task}", tokens + (task == "I2V"), EMPTY_TEXT.shard)
                         for task in TASKS})
        for i, tokens in enumerate(texts))
    return IndexRow(shard, row, f"{name}{row:06d}", 0, 0, 0, thw, 1.0, captions)


def make_index(shards: int = 6, samples: int = 40, snapshot: str = "memory", name: str = "clip",
               frames: Sequence[int] = (1, 1, 2, 3, 5)) -> MemoryIndex:
    """Images and videos of 17 to 600 tokens, with one to three captions."""
    rng = random.Random(0)
    rows = [
        make_row(n // samples, n, (rng.choice(frames), rng.choice((4, 6, 8)), rng.choice((4, 8, 12))),
                 [rng.randrange(2, 100) for _ in range(rng.randrange(1, 4))], name)
        for n in range(shards * samples)]
    return MemoryIndex(tuple(tuple(rows[i:i + samples]) for i in range(0, len(rows), samples)), snapshot)

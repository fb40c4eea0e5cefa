"""Clips that stand in several video shards: in the index each is once, at its first place, with the captions of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grn_scale.data.columns import KEY_DTYPE, key_hashes
from grn_scale.data.index_parts import VIDEO_SCHEMA, read_table, read_video_part, write_video_part
from grn_scale.data.schema import Caption, IndexRow, ShardInfo
from grn_scale.storage import Storage


def without_repeats(storage: Storage, shards: Sequence[ShardInfo], empty_tokens: int) -> tuple[list[ShardInfo], int]:
    """The video shards in order, and how many clips stand in several.

    Shards that such clips touch get new index parts; one of which no clip is left is not among the result, though its
    tar stays. empty_tokens: of the empty caption. Takes 16 bytes a clip.
    """
    places = _places(storage, shards)
    extra: dict[str, list[Caption]] = {key: [] for key in places}
    for number in sorted({number for numbers in places.values() for number in numbers[1:]}):
        for row in read_video_part(storage, shards[number], number, 0):
            if number in places.get(row.key, ())[1:]:
                extra[row.key] += row.captions
    touched = {number for numbers in places.values() for number in numbers}
    result = []
    for number, shard in enumerate(shards):
        if number in touched:
            kept = [replace(row, captions=_merged(row, extra.get(row.key, ())))
                    for row in read_video_part(storage, shard, number, 0)
                    if number not in places.get(row.key, ())[1:]]
            if not kept:
                continue
            shard = write_video_part(storage, replace(shard, samples=len(kept)), kept, empty_tokens)
        result.append(shard)
    return result, len(places)


def _places(storage: Storage, shards: Sequence[ShardInfo]) -> dict[str, list[int]]:
    """Key -> numbers of the shards it stands in, for the clips that stand in several."""
    hashes = [key_hashes(_keys(storage, shard)) for shard in shards]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True) if hashes else (np.zeros(0), np.zeros(0))
    suspects = values[counts > 1]
    places: dict[str, list[int]] = {}
    for number, shard in enumerate(shards) if len(suspects) else ():
        found = np.isin(hashes[number], suspects)
        if found.any():
            for key in _keys(storage, shard)[found]:
                places.setdefault(key.decode(), []).append(number)
    return {key: numbers for key, numbers in places.items() if len(numbers) > 1}


def _keys(storage: Storage, shard: ShardInfo) -> np.ndarray:
    return np.array(read_table(storage, shard, VIDEO_SCHEMA)["key"].to_pylist(), KEY_DTYPE)


def _merged(row: IndexRow, extra: Sequence[Caption]) -> tuple[Caption, ...]:
    """The row's captions, then those of other shards that it lacks."""
    captions: dict[tuple[str, tuple[tuple[str, str], ...]], Caption] = {}
    for caption in (*row.captions, *extra):
        texts = tuple((task, ref.key) for task, ref in sorted(caption.texts.items()))
        captions.setdefault((caption.type, texts), caption)
    return tuple(captions.values())

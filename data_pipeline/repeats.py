"""Clips that stand in several video shards: in the index each is once, at its first place, with the captions of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grn_scale.data.caption_columns import CaptionColumns
from grn_scale.data.columns import KEY_DTYPE, key_hashes
from grn_scale.data.index_parts import VIDEO_SCHEMA, read_table, write_video_table
from grn_scale.data.schema import ShardInfo
from grn_scale.data_pipeline.read_ahead import read_ahead
from grn_scale.storage import Storage


@dataclass(frozen=True, eq=False)
class _Repeats:
    """n rows of clips that stood before, in the order of the shards and their rows; int64 [n] each."""

    shard: np.ndarray
    row: np.ndarray
    first_shard: np.ndarray
    """Where the clip stands first."""
    first_row: np.ndarray


def without_repeats(storage: Storage, shards: Sequence[ShardInfo], empty_tokens: int) -> tuple[list[ShardInfo], int]:
    """The video shards in order, and how many clips stand in several.

    Shards that such clips touch get new index parts; one of which no clip is left is not among the result, though its
    tar stays. empty_tokens: of the empty caption. Takes 17 bytes a clip, and the captions of the repeats. Each part is
    read once, those with repeats four times, several at a time.
    """
    repeats = _find(storage, shards)
    if not len(repeats.row):
        return list(shards), 0
    extra = CaptionColumns.join(list(read_ahead(
        lambda number: CaptionColumns.of(read_table(storage, shards[number], VIDEO_SCHEMA)).of_samples(
            repeats.row[_run(repeats.shard, number)]),
        np.unique(repeats.shard).tolist())))
    by_first = np.argsort(repeats.first_shard, kind="stable")
    sorted_firsts = repeats.first_shard[by_first]

    def without(number: int) -> ShardInfo | None:
        shard, table = shards[number], read_table(storage, shards[number], VIDEO_SCHEMA)
        kept = np.ones(len(table), bool)
        kept[repeats.row[_run(repeats.shard, number)]] = False
        if not kept.any():
            return None
        more = by_first[_run(sorted_firsts, number)]
        captions = _merged(CaptionColumns.of(table), extra.of_samples(more), repeats.first_row[more])
        rows = np.flatnonzero(kept)
        table = captions.of_samples(rows).put_into(table.take(pa.array(rows)))
        return write_video_table(storage, replace(shard, samples=len(rows)), table, empty_tokens)

    touched = np.union1d(repeats.shard, repeats.first_shard).tolist()
    changed = dict(zip(touched, read_ahead(without, touched)))
    result = [changed.get(number, shard) for number, shard in enumerate(shards)]
    clips = np.unique(np.stack([repeats.first_shard, repeats.first_row]), axis=1).shape[1]
    return [shard for shard in result if shard is not None], clips


def _run(values: np.ndarray, value: int) -> slice:
    """Where `value` stands in the sorted `values`."""
    return slice(*np.searchsorted(values, (value, value + 1)))


def _find(storage: Storage, shards: Sequence[ShardInfo]) -> _Repeats:
    hashes = list(read_ahead(lambda shard: key_hashes(_keys(storage, shard)), shards))
    suspects = _repeated(hashes)
    places = []
    for number in range(len(shards)) if len(suspects) else ():
        at = np.minimum(np.searchsorted(suspects, hashes[number]), len(suspects) - 1)
        rows = np.flatnonzero(suspects[at] == hashes[number])
        if len(rows):
            places.append((number, rows))
    found = [(np.zeros(0, KEY_DTYPE), np.zeros(0, np.int64), np.zeros(0, np.int64))]
    found += read_ahead(lambda place: (_keys(storage, shards[place[0]])[place[1]],
                                       np.full(len(place[1]), place[0]), place[1]), places)
    keys, shard_of, row_of = map(np.concatenate, zip(*found))
    # Equal hashes only suggest equal keys. `first` is the first place of each, as they are in order.
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    home = first[group]
    again = home != np.arange(len(keys))
    return _Repeats(shard_of[again], row_of[again], shard_of[home[again]], row_of[home[again]])


def _repeated(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """uint64, sorted: the values that stand more than once in arrays of uint64."""
    ordered = np.concatenate([np.zeros(0, np.uint64), *hashes])
    ordered.sort()
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _keys(storage: Storage, shard: ShardInfo) -> np.ndarray:
    return np.array(read_table(storage, shard, VIDEO_SCHEMA)["key"].to_pylist(), KEY_DTYPE)


def _merged(own: CaptionColumns, extra: CaptionColumns, rows: np.ndarray) -> CaptionColumns:
    """For each sample its own captions, then of the extra ones, whose samples are `rows` of the own, those that it
    lacks."""
    both = CaptionColumns.join([own, extra])
    owners = np.concatenate([own.owners, rows[extra.owners]])
    captions = np.argsort(owners, kind="stable")
    _, first = np.unique(np.stack([owners, _identities(both)])[:, captions], axis=1, return_index=True)
    captions = captions[np.sort(first)]
    return both.regrouped(captions, np.bincount(owners[captions], minlength=len(own.first) - 1))


def _identities(captions: CaptionColumns) -> np.ndarray:
    """int64 [m]: equal for captions of the same type with the same texts, by task and key."""
    tasks, keys = (_codes(captions.texts.field(name)) for name in ("task", "key"))
    order = np.lexsort((tasks, captions.text_owners))
    names = pc.binary_join_element_wise(*(pa.array(codes[order]).cast(pa.string()) for codes in (tasks, keys)), "-")
    texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(captions.text_first, pa.int32()), names), ",")
    types = pa.array(_codes(captions.types)).cast(pa.string())
    return _codes(pc.binary_join_element_wise(types, texts, ":"))


def _codes(names: pa.StringArray) -> np.ndarray:
    return names.dictionary_encode().indices.to_numpy().astype(np.int64)

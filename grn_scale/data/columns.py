"""The columns of a video shard as arrays, made without a Python object for each sample: what plans work on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from grn_scale.batch import TASKS
from grn_scale.data.schema import MOST_KEY_BYTES
from grn_scale.errors import UserError

KEY_DTYPE = np.dtype(f"S{MOST_KEY_BYTES}")
_NO_DIGIT = 255
_DIGITS = np.full(256, _NO_DIGIT, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


@dataclass(frozen=True)
class ShardColumns:
    """n samples of one video shard with m captions in all, in the order of its tar."""

    keys: np.ndarray
    """S32 [n], padded with zero bytes."""
    key_hash: np.ndarray
    """uint64 [n]: the key's first 16 hex digits; xxh3_64 of the key where it does not begin with as many."""
    thw: np.ndarray
    """int32 [n, 3]: latent frames, height, width."""
    ratio_key: np.ndarray
    """float64 [n]."""
    class_id: np.ndarray
    """int64 [n], -1 where there is none."""
    caption_first: np.ndarray
    """int64 [n + 1]: sample i has captions caption_first[i] to caption_first[i + 1] - 1."""
    caption_tokens: np.ndarray
    """int32 [m, 3]: text tokens for each of TASKS, 0 where a caption has no entry for the task."""

    def __len__(self) -> int:
        return len(self.keys)


def shard_columns(table: pa.Table) -> ShardColumns:
    """Columns of a video part's table. UserError where a caption has an entry for an unknown task."""
    captions = table["captions"].combine_chunks()
    texts = captions.flatten().field("texts")
    entries = texts.flatten()
    first = _offsets(captions)
    tokens = np.zeros((int(first[-1]), len(TASKS)), np.int32)
    task = pc.index_in(entries.field("task"), pa.array(TASKS))
    if task.null_count:
        raise UserError(f"a caption in the index has an entry for a task that is none of {', '.join(TASKS)}")
    caption = np.repeat(np.arange(len(tokens)), np.diff(_offsets(texts)))
    tokens[caption, task.to_numpy()] = entries.field("tokens").to_numpy()
    keys = _keys(table["key"].combine_chunks())
    return ShardColumns(
        keys=keys, key_hash=key_hashes(keys),
        thw=np.stack([table[name].to_numpy() for name in "thw"], axis=1),
        ratio_key=table["ratio_key"].to_numpy(), class_id=table["class_id"].fill_null(-1).to_numpy(),
        caption_first=first, caption_tokens=tokens)


def key_hashes(keys: np.ndarray) -> np.ndarray:
    """uint64 [n] for keys S32 [n]: what stands in `ShardColumns.key_hash`."""
    digits = _DIGITS[keys.view(np.uint8).reshape(len(keys), MOST_KEY_BYTES)[:, :16]]
    weights = np.uint64(1) << np.arange(60, -4, -4, dtype=np.uint64)
    found = (digits * weights).sum(axis=1, dtype=np.uint64)
    for i in np.flatnonzero((digits == _NO_DIGIT).any(axis=1)):
        found[i] = xxhash.xxh3_64_intdigest(keys[i])
    return found


def _offsets(lists: pa.ListArray) -> np.ndarray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def _keys(column: pa.StringArray) -> np.ndarray:
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    lengths = np.diff(offsets)
    if lengths.max(initial=0) > MOST_KEY_BYTES:
        raise UserError(f"a key in the index is longer than {MOST_KEY_BYTES} bytes")
    padded = np.zeros((len(column), MOST_KEY_BYTES), np.uint8)
    padded[np.arange(MOST_KEY_BYTES) < lengths[:, None]] = np.frombuffer(
        column.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return padded.view(KEY_DTYPE)[:, 0]

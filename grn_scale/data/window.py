"""One window of an epoch: the draws of some shards, shuffled and packed, as columns.

All choices are drawn by hashes of what they are for, for all samples of the window at once. A Draw object is made only
when its pack is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grn_scale.batch import TASKS, Draw, Pack
from grn_scale.data.columns import ShardColumns
from grn_scale.data.mixture import Mixture, Visits
from grn_scale.data.packing import pack
from grn_scale.data.split import held_out_samples
from grn_scale.errors import ConfigError, UserError
from grn_scale.keyed import hash64, key64, uniforms

T2I, T2V, I2V = range(len(TASKS))
EMPTY_CAPTION = -1


@dataclass(frozen=True)
class DrawRules:
    """What decides the draws and packs of an epoch besides the index: settings of the data section, and the seed."""

    seed: int
    token_budget: int
    caption_drop: float = 0.0
    i2v_share: float = 0.0
    validation_fraction: float = 0.0
    split: str = "train"

    def in_split(self, columns: ShardColumns) -> np.ndarray:
        """bool [n]: samples of the split."""
        return held_out_samples(columns.key_hash, self.validation_fraction) == (self.split == "validation")

    def tasks(self, image: np.ndarray) -> np.ndarray:
        """bool [n, 3]: which of TASKS a sample may be drawn as (image bool [n]: it has one latent frame)."""
        return np.stack([image, ~image & (self.i2v_share < 1), ~image & (self.i2v_share > 0)], axis=1)

    def longest(self, columns: ShardColumns, empty_tokens: int) -> np.ndarray:
        """int64 [n]: tokens of each sample with its longest text, of those that it may be drawn with."""
        counts = np.diff(columns.caption_first)
        text = np.where((counts == 0) | (self.caption_drop > 0), empty_tokens, 0)
        owner = np.repeat(np.arange(len(columns)), counts)
        drawn = self.tasks(columns.thw[:, 0] == 1)[owner]
        np.maximum.at(text, owner, (columns.caption_tokens * drawn).max(axis=1, initial=0))
        return columns.thw.astype(np.int64).prod(axis=1) + text + 1

    def check_captions(self, columns: ShardColumns, taken: np.ndarray) -> None:
        """ConfigError, naming the first of the samples that are taken (bool [n]) with a caption that lacks the text of
        a task that it may be drawn as."""
        owner = np.repeat(np.arange(len(columns)), np.diff(columns.caption_first))
        lacking = (self.tasks(columns.thw[:, 0] == 1) & taken[:, None])[owner] & (columns.caption_tokens == 0)
        if lacking.any():
            caption, task = np.argwhere(lacking)[0]
            raise ConfigError(
                f"sample {columns.keys[owner[caption]].decode()} has no {TASKS[task]} entry for one of its captions, "
                f"but may be drawn as {TASKS[task]}: tokenize the captions for {TASKS[task]}, or set data.i2v_share "
                "so that it is not drawn")


@dataclass(frozen=True, eq=False)
class Window:
    """Draws of one window, and the packs they form."""

    index: np.ndarray
    """int64 [n]: global draw index."""
    dataset: np.ndarray
    """int64 [n]."""
    row: np.ndarray
    """int64 [n]: row in the dataset."""
    class_id: np.ndarray
    """int64 [n], -1 where there is none."""
    keys: np.ndarray
    """S32 [n]."""
    thw: np.ndarray
    """int32 [n, 3]."""
    ratio_key: np.ndarray
    """float64 [n]."""
    task: np.ndarray
    """int64 [n], by TASKS."""
    caption: np.ndarray
    """int64 [n]; EMPTY_CAPTION where it is dropped or there is none."""
    text_tokens: np.ndarray
    """int64 [n]."""
    packs: list[list[int]]
    """Draws (from 0 to n - 1) of each pack."""

    def __len__(self) -> int:
        """Packs."""
        return len(self.packs)

    def pack(self, number: int, epoch: int, position: int) -> Pack:
        """Pack `number` of the window, which is the epoch's pack `position`."""
        return Pack(epoch, position, tuple(self._draw(i) for i in self.packs[number]))

    def _draw(self, i: int) -> Draw:
        t, h, w = self.thw[i].tolist()
        return Draw(index=int(self.index[i]), key=self.keys[i].decode(), row=int(self.row[i]), thw=(t, h, w),
                    ratio_key=float(self.ratio_key[i]), task=TASKS[self.task[i]], caption=int(self.caption[i]),
                    text_tokens=int(self.text_tokens[i]), dataset=int(self.dataset[i]),
                    class_id=int(self.class_id[i]) if self.class_id[i] >= 0 else None)


@dataclass(frozen=True)
class ShardVisit:
    """One pass of an epoch over a shard; a shard whose samples are visited more than once has several."""

    dataset: int
    shard: int
    repeat: int
    """Takes the samples with more visits than this."""


@dataclass(frozen=True, eq=False)
class TakenSamples:
    """Which samples the n draws of a window take, ahead of what is drawn for them."""

    index: np.ndarray
    """int64 [n]: global draw index, ascending."""
    dataset: np.ndarray
    """int64 [n]."""
    row: np.ndarray
    """int64 [n]: row in the dataset."""
    keys: np.ndarray
    """S32 [n]."""
    read: list[ShardColumns]
    """Of each pass over a shard."""
    taken_of: list[np.ndarray]
    """bool: which samples of each pass."""
    chosen: np.ndarray
    """int64 [n]: number of the sample among those of all passes."""


def take_samples(mixture: Mixture, visits: Sequence[Visits], rules: DrawRules, order: int,
                 shards: Sequence[ShardVisit], first: int) -> TakenSamples:
    """The samples that these passes over shards take, in the order of epoch `order`.

    visits: of each dataset. first: draw index of the window's first place. Samples that are not visited keep their
    places in the count, so a draw index takes no look at other windows.
    """
    read = [mixture.datasets[visit.dataset].columns(visit.shard) for visit in shards]
    taken_of = [(visits[v.dataset].of(c, rules.seed, order) > v.repeat) & rules.in_split(c)
                for v, c in zip(shards, read)]
    # Shuffled by the samples' keys, so that only what is in the window counts, not how it came there.
    place = _join([hash64(key64(rules.seed, "sample order", order, v.dataset, v.repeat), c.key_hash)
                   for v, c in zip(shards, read)], np.uint64)
    shuffled = np.argsort(place, kind="stable")
    shuffled_taken = _join(taken_of, bool)[shuffled]
    chosen = shuffled[shuffled_taken]
    dataset = _join([np.full(len(c), v.dataset) for v, c in zip(shards, read)], np.int64)[chosen]
    rows = _join([np.arange(len(c)) + mixture.first_rows[v.dataset][v.shard] for v, c in zip(shards, read)], np.int64)
    keys = _join([c.keys for c in read], "S32")[chosen]
    return TakenSamples(first + np.flatnonzero(shuffled_taken), dataset, rows[chosen], keys, read, taken_of, chosen)


def plan_window(mixture: Mixture, visits: Sequence[Visits], rules: DrawRules, order: int,
                shards: Sequence[ShardVisit], first: int) -> Window:
    """The draws of these passes over shards, in the order of epoch `order`, and their packs (see `take_samples`).

    Raises ConfigError for a caption that lacks the text of a task; UserError for a sample longer than the budget, which
    the summary then has wrong.
    """
    taken = take_samples(mixture, visits, rules, order, shards, first)
    read, chosen, index, dataset = taken.read, taken.chosen, taken.index, taken.dataset
    for columns, taken_here in zip(read, taken.taken_of):
        rules.check_captions(columns, taken_here)
    thw = _join([c.thw for c in read], np.int32, 3)[chosen]
    from_image = uniforms(key64(rules.seed, "task"), index) < rules.i2v_share
    task = np.where(thw[:, 0] == 1, T2I, np.where(from_image, I2V, T2V))
    caption, text_tokens = _draw_captions(rules, read, chosen, index, task, np.array(
        [each.info.empty_text.tokens for each in mixture.datasets])[dataset])
    lengths = thw.astype(np.int64).prod(axis=1) + text_tokens + 1
    if len(lengths) and lengths.max() > rules.token_budget:
        worst = int(lengths.argmax())
        raise UserError(f"sample {taken.keys[worst].decode()} has {lengths[worst]} tokens, more than data.token_budget "
                        f"= {rules.token_budget}, but the summary of {mixture.name(int(dataset[worst]))} says that "
                        "none has: `grn-scale index repair` writes it anew")
    packs = pack(lengths.tolist(), rules.token_budget)
    heads = np.array([index[members[0]] for members in packs], np.int64)
    mixed = np.argsort(hash64(key64(rules.seed, "pack order"), heads), kind="stable")
    return Window(
        index=index, dataset=dataset, row=taken.row, class_id=_join([c.class_id for c in read], np.int64)[chosen],
        keys=taken.keys, thw=thw, ratio_key=_join([c.ratio_key for c in read], np.float64)[chosen], task=task,
        caption=caption, text_tokens=text_tokens, packs=[packs[i] for i in mixed])


def _draw_captions(rules: DrawRules, read: Sequence[ShardColumns], chosen: np.ndarray, index: np.ndarray,
                   task: np.ndarray, empty_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Caption and text tokens of each draw, both int64."""
    counts = _join([np.diff(c.caption_first) for c in read], np.int64)
    firsts = (np.cumsum(counts) - counts)[chosen]
    counts = counts[chosen]
    caption = (uniforms(key64(rules.seed, "caption"), index) * counts).astype(np.int64)
    dropped = (counts == 0) | (uniforms(key64(rules.seed, "caption drop"), index) < rules.caption_drop)
    caption[dropped] = EMPTY_CAPTION
    tokens = empty_tokens.astype(np.int64)
    all_tokens = _join([c.caption_tokens for c in read], np.int64, len(TASKS))
    tokens[~dropped] = all_tokens[(firsts + caption)[~dropped], task[~dropped]]
    return caption, tokens


def _join(arrays: Sequence[np.ndarray], dtype: np.dtype | type | str, *columns: int) -> np.ndarray:
    """All rows of the arrays; of none an empty array [0, *columns]."""
    return np.concatenate([np.zeros((0, *columns), dtype), *(array.astype(dtype, copy=False) for array in arrays)])

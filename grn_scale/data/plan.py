"""From a dataset's index to the packs of every step, without reading data.

The order of an epoch is a pure function of the index snapshot, the seed, the epoch and the plan's settings:
shards are permuted, taken `window_shards` at a time, and the samples of a window are shuffled, packed, and the
packs shuffled. Nothing depends on ranks, workers or the size of a step, so any rank computes what any other
reads, and a run resumes exactly at another size. Only a window's rows are in memory at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from grn_scale.batch import Draw, Pack
from grn_scale.config.data_schema import DataConfig
from grn_scale.data.packing import pack
from grn_scale.data.schema import DatasetInfo, IndexRow, TextRef
from grn_scale.errors import ConfigError
from grn_scale.keyed import key64, uniform

FIRST_VALIDATION_DRAW = 1 << 60
"""Draw indices of the validation split start here, far above those of any training run."""


class Index(Protocol):
    """What a plan needs of a dataset (grn_scale.data.shards.Dataset has it)."""

    snapshot: str
    shard_sizes: Sequence[int]
    info: DatasetInfo

    def rows(self, shard: int) -> list[IndexRow]: ...


@dataclass(frozen=True)
class DataState:
    """Where the sample stream stands: everything a checkpoint has to keep of the data."""

    snapshot: str
    """Of the index."""
    epoch: int = 0
    position: int = 0
    """Packs of the epoch already taken."""
    skip: tuple[str, ...] = ()
    """Keys of samples that could not be read, sorted. Their slots stay in the packs, with weight 0."""
    settings: str = ""
    """The plan's settings, which a stream keeps until its epoch ends."""

    def with_skips(self, keys: Iterable[str]) -> DataState:
        """The same state with more keys to skip (found here, or merged from other ranks)."""
        return replace(self, skip=tuple(sorted({*self.skip, *keys})))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        """Inverse of `to_dict`. Raises ConfigError where a field is missing, unknown or of another type."""
        try:
            state = cls(**{**values, "skip": tuple(values["skip"])})
            fits = all(isinstance(getattr(state, name), kind) for name, kind in
                       (("snapshot", str), ("epoch", int), ("position", int), ("settings", str)))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the data state {values!r} cannot be read: {error}") from error
        if not fits or state.epoch < 0 or state.position < 0:
            raise ConfigError(f"the data state {values!r} cannot be read: "
                              "epoch and position must be whole numbers from 0, snapshot and settings text")
        return state


def held_out(key: str, fraction: float) -> bool:
    """Whether the sample belongs to the validation split. Depends on its key alone: not on the seed, nor on what
    else the dataset holds; a larger fraction only adds samples."""
    return uniform("validation split", key) < fraction


def sample_weights(packs: Iterable[Pack], gamma: float) -> dict[int, float]:
    """Loss weight of each draw of a step, by draw index: n_i^gamma over the sum for the whole global batch, with n_i
    the predicted tokens. The sum counts planned draws, also those that turn out unreadable (GRN reference, section 5;
    for one pack it is the reference's weighting)."""
    powers = {draw.index: draw.predicted_tokens**gamma for p in packs for draw in p.draws}
    total = sum(powers.values())
    return {index: power / total for index, power in powers.items()}


class Plan:
    """The packs of every epoch of one dataset, for one split.

    Making a plan reads the whole index once (no data) and refuses what could not be trained: an empty split, or a
    sample longer than the token budget. Draw indices are epoch * samples + place in the epoch's order; validation
    draws are the same in every epoch, are never dropped to the empty caption, and never share an index with training.
    """

    def __init__(self, index: Index, *, seed: int, token_budget: int, caption_drop: float = 0.0,
                 i2v_share: float = 0.0, window_shards: int = 16, validation_fraction: float = 0.0,
                 split: str = "train") -> None:
        """Raises ConfigError for an unknown or empty split, a sample longer than the budget (naming it), and a
        caption that lacks the text entry of a task that may be drawn."""
        if split not in ("train", "validation"):
            raise ConfigError(f"split is {split!r}, but must be train or validation")
        self.index = index
        self.seed = seed
        self.token_budget = token_budget
        self.caption_drop = caption_drop if split == "train" else 0.0
        self.i2v_share = i2v_share
        self.window_shards = window_shards
        self.validation_fraction = validation_fraction
        self.split = split
        self._sizes = tuple(index.shard_sizes)
        self.total = sum(self._sizes)
        self.windows = -(-len(self._sizes) // window_shards)
        self._order = functools.lru_cache(maxsize=2)(self._permute_shards)
        self._window = functools.lru_cache(maxsize=2)(self._plan_window)
        self._counts: dict[tuple[int, int], int] = {}
        self.samples = self._check()
        """Samples of the split: draws of one epoch."""

    @classmethod
    def of(cls, index: Index, data: DataConfig, seed: int, split: str = "train") -> Plan:
        """Plan with the settings of a configuration's data section."""
        return cls(index, seed=seed, token_budget=data.token_budget, caption_drop=data.caption_drop,
                   i2v_share=data.i2v_share, window_shards=data.window_shards,
                   validation_fraction=data.validation_fraction, split=split)

    @property
    def settings(self) -> str:
        """What packs depend on besides the snapshot and the epoch, as text."""
        return (f"split={self.split} seed={self.seed} token_budget={self.token_budget} "
                f"caption_drop={self.caption_drop} i2v_share={self.i2v_share} window_shards={self.window_shards} "
                f"validation_fraction={self.validation_fraction}")

    def start(self) -> DataState:
        """State before the first pack."""
        return DataState(self.index.snapshot, settings=self.settings)

    def next_step(self, state: DataState, packs_per_step: int) -> tuple[list[Pack], DataState]:
        """The next `packs_per_step` packs and the state after them.

        The last step of an epoch is filled with empty packs, and the state after it stands at the next epoch's
        start. Raises ConfigError for a state that this plan cannot continue.
        """
        self.check_state(state)
        packs: list[Pack] = []
        following = replace(state, epoch=state.epoch + 1, position=0, settings=self.settings)
        for number, p in enumerate(self._packs_from(state.epoch, state.position), state.position):
            if len(packs) == packs_per_step:
                following = replace(state, position=number, settings=self.settings)
                break
            packs.append(p)
        if not packs:
            raise ConfigError(f"the data state stands at pack {state.position} of epoch {state.epoch}, but that epoch "
                              f"has only {self.packs_in_epoch(state.epoch)} packs: the state is not of this plan")
        packs += [Pack(state.epoch, -1, ())] * (packs_per_step - len(packs))
        return packs, following

    def packs_in_epoch(self, epoch: int) -> int:
        """Number of packs (fillers not counted). Plans each window once; the counts are kept, the packs are not."""
        return sum(self._count(epoch, window) for window in range(self.windows))

    def at_least(self, packs: int) -> bool:
        """Whether the first epoch has this many packs, planning no more windows than the answer takes."""
        found = 0
        for window in range(self.windows):
            found += self._count(0, window)
            if found >= packs:
                return True
        return False

    def state_at(self, step: int, packs_per_step: int) -> DataState:
        """State before step `step` (from 0) of a run that took `packs_per_step` packs at every step."""
        epoch = 0
        while step >= (steps := -(-self.packs_in_epoch(epoch) // packs_per_step)):
            step -= steps
            epoch += 1
        return replace(self.start(), epoch=epoch, position=step * packs_per_step)

    def _packs_from(self, epoch: int, position: int) -> Iterator[Pack]:
        # Finding the window of a position takes the pack counts of the windows before it, once a process.
        first = 0
        for window in range(self.windows):
            if first + self._count(epoch, window) > position:
                for p in self._window(epoch, window)[max(0, position - first):]:
                    yield replace(p, position=first + p.position)
            first += self._count(epoch, window)

    def _count(self, epoch: int, window: int) -> int:
        if (epoch, window) not in self._counts:
            self._counts[epoch, window] = len(self._window(epoch, window))
        return self._counts[epoch, window]

    def _order_of(self, epoch: int) -> int:
        """Epoch whose order and draws are used: evaluations repeat the first."""
        return epoch if self.split == "train" else 0

    def _permute_shards(self, epoch: int) -> list[int]:
        shards = range(len(self._sizes))
        return sorted(shards, key=lambda shard: (key64(self.seed, "shard order", epoch, shard), shard))

    def _plan_window(self, epoch: int, window: int) -> list[Pack]:
        """Packs of one window, their positions counted from the window's start."""
        order = self._order_of(epoch)
        shards = self._order(order)
        begin = window * self.window_shards
        rows = [row for shard in shards[begin:begin + self.window_shards] for row in self.index.rows(shard)]
        rows.sort(key=lambda row: (key64(self.seed, "sample order", order, row.key), row.row))
        # The held-out samples keep their places in the count, so that a draw index takes no look at other windows.
        first = sum(self._sizes[shard] for shard in shards[:begin])
        first += FIRST_VALIDATION_DRAW if self.split == "validation" else order * self.total
        draws = [self._draw(row, first + place) for place, row in enumerate(rows) if self._in_split(row)]
        groups = pack([draw.tokens for draw in draws], self.token_budget)
        groups.sort(key=lambda group: (key64(self.seed, "pack order", draws[group[0]].index), group[0]))
        return [Pack(epoch, position, tuple(draws[i] for i in group)) for position, group in enumerate(groups)]

    def _in_split(self, row: IndexRow) -> bool:
        return held_out(row.key, self.validation_fraction) == (self.split == "validation")

    def _draw(self, row: IndexRow, index: int) -> Draw:
        task = "T2I"
        if row.thw[0] > 1:
            task = "I2V" if self.i2v_share and uniform(self.seed, "task", index) < self.i2v_share else "T2V"
        text = self.index.info.empty_text
        if row.captions and not (self.caption_drop and uniform(self.seed, "caption drop", index) < self.caption_drop):
            choice = 0
            if len(row.captions) > 1:
                choice = int(uniform(self.seed, "caption", index) * len(row.captions))
            text = row.captions[choice].texts[task]
        return Draw(index, row.key, row.row, row.thw, row.ratio_key, task, text.key, text.tokens)

    def _possible_texts(self, row: IndexRow) -> Iterator[TextRef]:
        """Every text entry that a draw of the row may take."""
        if not row.captions or self.caption_drop:
            yield self.index.info.empty_text
        tasks = ["T2I"]
        if row.thw[0] > 1:
            tasks = ["T2V"] * (self.i2v_share < 1) + ["I2V"] * (self.i2v_share > 0)
        for caption in row.captions:
            for task in tasks:
                if task not in caption.texts:
                    raise ConfigError(f"sample {row.key} has no {task} entry for one of its captions, but may be drawn "
                                      f"as {task}: tokenize the captions for {task}, or set data.i2v_share so that it "
                                      "is not drawn")
                yield caption.texts[task]

    def _check(self) -> int:
        """Number of samples of the split, after checking each; one pass over the index, a shard at a time."""
        samples, longest, key = 0, 0, ""
        for shard in range(len(self._sizes)):
            for row in self.index.rows(shard):
                if not self._in_split(row):
                    continue
                samples += 1
                t, h, w = row.thw
                length = t * h * w + max(text.tokens for text in self._possible_texts(row)) + 1
                if length > longest:
                    longest, key = length, row.key
        if longest > self.token_budget:
            raise ConfigError(
                f"sample {key} has {longest} tokens with its longest caption, but a pack holds data.token_budget = "
                f"{self.token_budget}: set data.token_budget to at least {-(-longest // 128) * 128}, or tokenize "
                "shorter or smaller clips (tokenize.max_frames, tokenize.latent_side)")
        if not samples:
            other = self.total and ("set data.validation_fraction lower" if self.split == "train" else
                                    "set data.validation_fraction higher, or train.validate_every=0")
            raise ConfigError(f"the {self.split} split has no sample: the dataset holds {self.total} and "
                              f"data.validation_fraction is {self.validation_fraction}; {other or 'add samples'}")
        return samples

    def check_state(self, state: DataState) -> None:
        """Raise ConfigError for a state of another snapshot, or of another plan in the middle of an epoch."""
        if state.snapshot != self.index.snapshot:
            raise ConfigError(
                f"the data state belongs to snapshot {state.snapshot[:12]} of the index, but the dataset is at "
                f"{self.index.snapshot[:12]}: its order is another one. Give data.dataset the folder the run was "
                "started with, or start a new run from the weights")
        if state.position and state.settings and state.settings != self.settings:
            changed = [f"{new} (was {old.partition('=')[2]})" for old, new in
                       zip(state.settings.split(), self.settings.split()) if old != new]
            raise ConfigError(
                f"the data state stands in the middle of epoch {state.epoch}, but the plan was changed: "
                f"{', '.join(changed)}. Samples would be seen twice or never: keep these settings until the epoch ends")

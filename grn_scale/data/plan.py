"""From the indexes of datasets to the packs of every step, without reading data.

The order of an epoch is a pure function of the index snapshots, the mixture, the seed, the epoch and the plan's
settings: the passes over shards are permuted so that each dataset is spread evenly, taken `window_shards` at a time,
and the samples of a window are shuffled, packed, and the packs shuffled. Nothing depends on ranks, workers or the size
of a step, so any rank computes what any other reads, and a run resumes exactly at another size. Making a plan takes the
summaries of the indexes, a step the parts of its window: both are the same at 10^9 samples as at 10^6.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from grn_scale.batch import Pack
from grn_scale.config.data_schema import DataConfig
from grn_scale.data.mixture import Index, Mixture, Visits
from grn_scale.data.state import DataState
from grn_scale.data.window import DrawRules, ShardVisit, TakenSamples, Window, plan_window, take_samples
from grn_scale.errors import ConfigError
from grn_scale.keyed import hash64, key64, uniforms

log = logging.getLogger(__name__)

FIRST_VALIDATION_DRAW = 1 << 60
"""Draw indices of the validation split start here, far above those of any training run."""
DRAWS_OF_AN_EPOCH = 1 << 40
"""Draw indices an epoch has to itself, however many it uses: they stay unique when the dataset grows or shrinks."""
ALGORITHM = 2
"""Raised with every change to order, draws or packs, which a run must not meet in the middle of an epoch."""


def sample_weights(packs: Iterable[Pack], gamma: float) -> dict[int, float]:
    """Loss weight of each draw of a step, by draw index: n_i^gamma over the sum for the whole global batch, with n_i
    the predicted tokens. The sum counts planned draws, also those that turn out unreadable (GRN reference, section 5;
    for one pack it is the reference's weighting)."""
    powers = {draw.index: draw.predicted_tokens**gamma for p in packs for draw in p.draws}
    total = sum(powers.values())
    return {index: power / total for index, power in powers.items()}


class Plan:
    """The packs of every epoch of a mixture, for one split.

    Making a plan reads the summaries of the indexes (no data) and refuses what could not be trained: an empty split, or
    a sample longer than the token budget. Validation visits each held-out sample of every dataset once; its draws are
    the same in every epoch, are never dropped to the empty caption, and never share an index with training.
    """

    def __init__(self, source: Mixture | Index, *, seed: int, token_budget: int, caption_drop: float = 0.0,
                 i2v_share: float = 0.0, window_shards: int = 16, validation_fraction: float = 0.0,
                 split: str = "train", image_share: float | None = None) -> None:
        """image_share: where the source is a dataset alone; a mixture has it in its visits.

        Raises ConfigError for an unknown or empty split, a sample longer than the budget (naming it), and a
        caption that lacks the text entry of a task that may be drawn (as soon as it is met).
        """
        if split not in ("train", "validation"):
            raise ConfigError(f"split is {split!r}, but must be train or validation")
        train = split == "train"
        self.mixture = Mixture.of(source, image_share)
        self.split = split
        self.token_budget = token_budget
        self.window_shards = window_shards
        self.rules = DrawRules(seed, token_budget, caption_drop if train else 0.0, i2v_share, validation_fraction,
                               split)
        self.visits = self.mixture.visits if train else (Visits(),) * len(self.mixture.datasets)
        self._passes = self._list_passes()
        self.windows = -(-len(self._passes) // window_shards)
        self._order = functools.lru_cache(maxsize=2)(self._permute_passes)
        self._window = functools.lru_cache(maxsize=2)(self._plan_window)
        self._counts: dict[tuple[int, int], int] = {}
        self._check_split()
        self._check_lengths()

    @classmethod
    def of(cls, source: Mixture | Index, data: DataConfig, seed: int, split: str = "train") -> Plan:
        """Plan with the settings of a configuration's data section."""
        return cls(source, seed=seed, token_budget=data.token_budget, caption_drop=data.caption_drop,
                   i2v_share=data.i2v_share, window_shards=data.window_shards,
                   validation_fraction=data.validation_fraction, split=split, image_share=data.image_share)

    @property
    def settings(self) -> str:
        """What packs depend on besides the snapshot and the epoch, as text."""
        rules = self.rules
        return (f"plan={ALGORITHM} split={self.split} seed={rules.seed} token_budget={rules.token_budget} "
                f"caption_drop={rules.caption_drop} i2v_share={rules.i2v_share} window_shards={self.window_shards} "
                f"validation_fraction={rules.validation_fraction} "
                f"visits={','.join(f'{v.images:.9g}/{v.videos:.9g}' for v in self.visits)}")

    def start(self) -> DataState:
        """State before the first pack."""
        return DataState(self.mixture.snapshot, settings=self.settings)

    def take_over(self, state: DataState) -> DataState:
        """The state of an epoch's start, moved to this plan's snapshot: how a stream goes on with grown datasets."""
        if state.position:
            raise ValueError(f"epoch {state.epoch} is under way: its order is that of snapshot {state.snapshot}")
        if state.snapshot == self.mixture.snapshot:
            return state
        log.info("from epoch %d on: snapshot %s with %d samples, in place of %s", state.epoch,
                 self.mixture.snapshot[:12], self.mixture.samples, state.snapshot[:12])
        return replace(state, snapshot=self.mixture.snapshot)

    def next_step(self, state: DataState, packs_per_step: int) -> tuple[list[Pack], DataState]:
        """The next `packs_per_step` packs and the state after them.

        The last step of an epoch is filled with empty packs, and the state after it stands at the next epoch's
        start. Raises ConfigError for a state that this plan cannot continue.
        """
        self.check_state(state)
        epoch, end = state.epoch, state.position + packs_per_step
        packs: list[Pack] = []
        first, count = state.window_first, 0
        following = replace(state, epoch=epoch + 1, position=0, window=0, window_first=0, settings=self.settings)
        for number, first, count in self._walk(epoch, state.window, state.window_first):
            if first + count > state.position:
                at = state.position + len(packs)
                window = self._window(epoch, number)
                packs += [window.pack(i - first, epoch, i) for i in range(at, min(end, first + count))]
            if first + count > end:
                following = replace(state, position=end, window=number, window_first=first, settings=self.settings)
                break
        if not packs:
            raise ConfigError(f"the data state stands at pack {state.position} of epoch {epoch}, but that epoch has "
                              f"only {first + count} packs: the state is not of this plan")
        packs += [Pack(epoch, -1, ())] * (packs_per_step - len(packs))
        return packs, following

    def first_packs(self, count: int) -> list[Pack]:
        """The first `count` packs of the first epoch, fewer where it has not as many."""
        return [p for p in self.next_step(self.start(), count)[0] if p.draws]

    def packs_in_epoch(self, epoch: int) -> int:
        """Number of packs (fillers not counted). Plans each window once; the counts are kept, the packs are not."""
        return sum(count for _, _, count in self._walk(epoch))

    def visits_in_epoch(self, epoch: int) -> int:
        """Draws of an epoch; a pass over the index."""
        return sum(
            int((visits.of(columns, self.rules.seed, self._order_of(epoch)) * self.rules.in_split(columns)).sum())
            for index, visits, shards in zip(self.mixture.datasets, self.visits, self.mixture.shards)
            for columns in map(index.columns, range(len(shards))))

    def taken_samples(self, epoch: int, window: int) -> TakenSamples:
        """Which samples a window of an epoch takes, under which draw indices: what a ledger is held against. Reads the
        parts of its shards, and makes no packs."""
        return take_samples(*self._visits_of(epoch, window))

    def window_borders(self, epoch: int) -> np.ndarray:
        """int64 [windows + 1]: draw indices that the windows of an epoch start with, and the first behind the last.

        An index between them may be no draw: it is the place of a sample that the epoch does not visit.
        """
        order = self._order_of(epoch)
        passes, places = self._order(order)
        end = int(places[-1] + passes["samples"][-1]) if len(passes) else 0
        return self._first_draw(order) + np.append(places[::self.window_shards], end)

    def at_least(self, packs: int) -> bool:
        """Whether the first epoch has this many packs. Where the sums of the summary alone promise four times as many,
        no window is planned for the answer."""
        share = self.rules.validation_fraction if self.split == "validation" else 1 - self.rules.validation_fraction
        tokens = sum(min(visits.images, visits.videos) * int(shards["tokens"].sum())
                     for visits, shards in zip(self.visits, self.mixture.shards))
        if tokens * share > 4 * packs * self.token_budget:
            return True
        return any(first + count >= packs for _, first, count in self._walk(0))

    def state_at(self, step: int, packs_per_step: int | Callable[[int], int],
                 track: Callable[[Iterator], Iterable] = iter) -> DataState:
        """State before step `step` (from 0) of a run that took `packs_per_step` packs at every step; a function gives
        the packs of each.

        Plans the windows before it, each once, which takes a while where they are thousands: a run resumes from the
        state it saved instead. track: shows how the walk over an epoch's windows comes along.
        """
        packs_of = packs_per_step if callable(packs_per_step) else lambda _: packs_per_step
        epoch = taken = 0
        while True:
            position = 0
            for number, first, count in track(self._walk(epoch)):
                while taken < step and position < first + count:
                    position += packs_of(taken)
                    taken += 1
                if position < first + count:
                    return replace(self.start(), epoch=epoch, position=position, window=number, window_first=first)
            epoch += 1

    def check_state(self, state: DataState) -> None:
        """Raise ConfigError for a state of another snapshot, or of another plan in the middle of an epoch."""
        if state.snapshot != self.mixture.snapshot:
            raise ConfigError(
                f"the data state belongs to snapshot {state.snapshot[:12]} of the index, but the dataset is at "
                f"{self.mixture.snapshot[:12]}: its order is another one. Give data.dataset the folder the run was "
                "started with, or start a new run from the weights")
        if state.position and state.settings and state.settings != self.settings:
            old = dict(word.split("=") for word in state.settings.split())
            changed = [f"{word} (was {old.get(word.partition('=')[0])})" for word in self.settings.split()
                       if old.get(word.partition("=")[0]) != word.partition("=")[2]]
            raise ConfigError(
                f"the data state stands in the middle of epoch {state.epoch}, but the plan was changed: "
                f"{', '.join(changed)}. Samples would be seen twice or never: keep these settings until the epoch ends")

    def _walk(self, epoch: int, window: int = 0, first: int = 0) -> Iterator[tuple[int, int, int]]:
        """(window, packs of the epoch before it, its packs) from `window` on, of which `first` is known."""
        for number in range(window, self.windows):
            if (epoch, number) not in self._counts:
                self._counts[epoch, number] = len(self._window(epoch, number))
            yield number, first, self._counts[epoch, number]
            first += self._counts[epoch, number]

    def _order_of(self, epoch: int) -> int:
        """Epoch whose order and draws are used: evaluations repeat the first."""
        return epoch if self.split == "train" else 0

    def _first_draw(self, order: int) -> int:
        """Draw index of an epoch's first place."""
        return FIRST_VALIDATION_DRAW if self.split == "validation" else order * DRAWS_OF_AN_EPOCH

    def _list_passes(self) -> np.ndarray:
        """Structured [passes]: the passes over shards that every epoch consists of, with the samples of the shard."""
        passes = []
        for dataset, (visits, shards) in enumerate(zip(self.visits, self.mixture.shards)):
            repeats = visits.repeats(shards)
            found = np.zeros(int(repeats.sum()), _PASS)
            found["dataset"], found["shard"] = dataset, np.repeat(np.arange(len(shards)), repeats)
            found["repeat"] = np.arange(len(found)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            found["samples"] = shards["samples"][found["shard"]]
            passes.append(found)
        return np.concatenate(passes)

    def _permute_passes(self, order: int) -> tuple[np.ndarray, np.ndarray]:
        """Passes in the order of an epoch, and the places before each of them.

        Each dataset is permuted by itself and dealt out evenly over the epoch, so that every window has its share.
        """
        seed, numbers = self.rules.seed, np.arange(len(self._passes))
        shuffled = np.lexsort((hash64(key64(seed, "shard order", order), numbers), self._passes["dataset"]))
        counts = np.bincount(self._passes["dataset"], minlength=len(self.visits))
        rank = numbers - np.repeat(np.cumsum(counts) - counts, counts)
        slot = (rank + uniforms(key64(seed, "shard slot", order), numbers)) / np.repeat(counts, counts)
        passes = self._passes[shuffled[np.argsort(slot, kind="stable")]]
        return passes, np.cumsum(passes["samples"]) - passes["samples"]

    def _plan_window(self, epoch: int, window: int) -> Window:
        return plan_window(*self._visits_of(epoch, window))

    def _visits_of(self, epoch: int, window: int) -> tuple:
        """What `plan_window` and `take_samples` take for a window."""
        order = self._order_of(epoch)
        passes, places = self._order(order)
        begin = window * self.window_shards
        shards = passes[["dataset", "shard", "repeat"]][begin:begin + self.window_shards]
        return (self.mixture, self.visits, self.rules, order, [ShardVisit(*visit) for visit in shards.tolist()],
                self._first_draw(order) + int(places[begin]))

    def _check_split(self) -> None:
        """Refuse a split without samples, reading parts only until one is found."""
        fraction, total = self.rules.validation_fraction, self.mixture.samples
        if self.split == "train" or fraction:
            for dataset, index in enumerate(self.mixture.datasets):
                for shard in np.flatnonzero(self.mixture.shards[dataset]["samples"]).tolist():
                    columns = index.columns(shard)
                    if (taken := self.rules.in_split(columns)).any():
                        self.rules.check_captions(columns, taken)
                        return
        other = total and ("set data.validation_fraction lower" if self.split == "train" else
                           "set data.validation_fraction higher, or train.validate_every=0")
        raise ConfigError(f"the {self.split} split has no sample: the dataset holds {total} and "
                          f"data.validation_fraction is {fraction}; {other or 'add samples'}")

    def _check_lengths(self) -> None:
        """Refuse a sample longer than the budget, naming the longest.

        The summary bounds the samples of each shard by any text of any task; only where a bound is beyond the budget
        its part is read, for the texts that may really be drawn.
        """
        longest, key = self.token_budget, ""
        for dataset, (index, shards) in enumerate(zip(self.mixture.datasets, self.mixture.shards)):
            for shard in np.argsort(-shards["longest"], kind="stable").tolist():
                if shards["longest"][shard] <= longest:
                    break
                columns = index.columns(shard)
                lengths = self.rules.longest(columns, index.info.empty_text.tokens) * self.rules.in_split(columns)
                if lengths.max() > longest:
                    longest, key = int(lengths.max()), columns.keys[lengths.argmax()].decode()
        if longest > self.token_budget:
            raise ConfigError(
                f"sample {key} has {longest} tokens with its longest caption, but a pack holds data.token_budget = "
                f"{self.token_budget}: set data.token_budget to at least {-(-longest // 128) * 128}, or tokenize "
                "shorter or smaller clips (tokenize.max_frames, tokenize.latent_side)")


_PASS = np.dtype([("dataset", np.int32), ("shard", np.int64), ("repeat", np.int64), ("samples", np.int64)])

"""From planned packs to the samples of each step, read ahead in the background.

A step's packs are the plan's; this file only reads those of one data-parallel rank. A sample that cannot be read
keeps its slot with `valid=False`, so packs, weights and the other ranks' work never change. The
ranks that share a copy of the model compare their flags afterwards (`parallel.groups.agree`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from grn_scale.batch import Draw, Pack, Sample
from grn_scale.data.dataset import CorruptSample
from grn_scale.data.mixture import Index, Mixture
from grn_scale.data.packing import Cost, assign
from grn_scale.data.plan import Plan, sample_weights
from grn_scale.data.schema import IndexRow, TextRef
from grn_scale.data.state import DataState
from grn_scale.data.window import EMPTY_CAPTION
from grn_scale.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)


class Source(Index, Protocol):
    """A dataset to read from (grn_scale.data.dataset.Dataset); its methods are called from several threads."""

    def locate(self, row: int) -> IndexRow: ...

    def read_bits(self, row: IndexRow) -> np.ndarray: ...

    def read_text(self, ref: TextRef) -> torch.Tensor: ...

    def read_text_ids(self, ref: TextRef) -> list[int]: ...


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and why."""

    shard: str
    """Name of the tar with the bytes at fault: the clip's, or its text's."""
    key: str
    """Of the video sample."""
    reason: str
    unreadable: bool
    """The read itself failed (the key goes to the skip list); otherwise the bytes are corrupt."""


@dataclass(frozen=True)
class LoadedPack:
    pack: Pack
    samples: list[Sample]
    """One for each draw of the pack, in its order."""


@dataclass(frozen=True)
class StepData:
    """One training step as one data-parallel rank sees it."""

    packs: list[Pack]
    """All packs of the step, of all ranks: totals are known without communication."""
    micro_batches: list[LoadedPack]
    """This rank's share, equally many on every rank."""
    weights: dict[int, float]
    """Loss weight of every draw of the step by draw index; they sum to 1."""
    state_after: DataState
    """What a checkpoint after this step has to keep."""
    bad: list[BadSample]
    """Samples of this rank that were found bad in this step."""


class UnreadableSample(OSError):
    """A read that failed at every attempt of the storage. `shard` is the name of the tar that it was for."""

    def __init__(self, shard: str, reason: str):
        super().__init__(reason)
        self.shard = shard


def _of_shard(shard: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise UnreadableSample(shard, str(error)) from error


def read_sample(mixture: Mixture, draw: Draw) -> Sample:
    """The draw with its bits, and its text's states, or token ids where the dataset holds no states.

    Raises CorruptSample for bytes that are not what the index says, and for a text whose index part is damaged;
    UnreadableSample for a read that failed, after the attempts that the storage makes.
    """
    dataset: Source = mixture.datasets[draw.dataset]
    row = mixture.locate(draw)
    shard = dataset.info.video_shards[row.shard].name
    bits = _of_shard(shard, lambda: dataset.read_bits(row))
    if bits.size != _packed_bytes(mixture, draw):
        raise CorruptSample(shard, draw.key, f"it has {bits.size} bytes, but {draw.thw} latent cells take "
                            f"{_packed_bytes(mixture, draw)}")
    ref = text_of(dataset, row, draw)
    if dataset.info.text_states == "none":
        return Sample(draw, bits, None, text_ids=_read_text_ids(dataset, ref, draw))
    return Sample(draw, bits, _read_text(dataset, ref, draw))


def text_of(dataset: Index, row: IndexRow, draw: Draw) -> TextRef:
    """The text entry that a draw of this row takes."""
    return dataset.info.empty_text if draw.caption == EMPTY_CAPTION else row.captions[draw.caption].texts[draw.task]


def _read_text(dataset: Source, ref: TextRef, draw: Draw) -> torch.Tensor:
    states = _of_shard(ref.shard, lambda: dataset.read_text(ref))
    planned = (draw.text_tokens, dataset.info.text_hidden_size)
    if tuple(states.shape) != planned:
        raise CorruptSample(ref.shard, draw.key, f"its text {ref.key} has states of shape {tuple(states.shape)}, but "
                            f"the index says {planned}")
    return states


def _read_text_ids(dataset: Source, ref: TextRef, draw: Draw) -> tuple[int, ...]:
    ids = tuple(_of_shard(ref.shard, lambda: dataset.read_text_ids(ref)))
    if len(ids) != draw.text_tokens:
        raise CorruptSample(ref.shard, draw.key, f"its text {ref.key} has {len(ids)} token ids, but the index says "
                            f"{draw.text_tokens}")
    return ids


def _packed_bytes(mixture: Mixture, draw: Draw) -> int:
    return (draw.visual_tokens * mixture.info.latent_channels * mixture.info.rounds + 7) // 8


def _zeros(mixture: Mixture, draw: Draw) -> Sample:
    bits = np.zeros(_packed_bytes(mixture, draw), dtype=np.uint8)
    info = mixture.datasets[draw.dataset].info
    if info.text_states == "none":
        return Sample(draw, bits, None, valid=False, text_ids=(0,) * draw.text_tokens)
    states = torch.zeros(draw.text_tokens, info.text_hidden_size, dtype=torch.bfloat16)
    return Sample(draw, bits, states, valid=False)


def _read_draw(mixture: Mixture, draw: Draw, skip: Collection[str]) -> tuple[Sample, BadSample | None]:
    if draw.key in skip:
        return _zeros(mixture, draw), None
    try:
        return read_sample(mixture, draw), None
    except CorruptSample as error:
        bad = BadSample(error.shard, draw.key, error.reason, unreadable=False)
    except UnreadableSample as error:
        bad = BadSample(error.shard, draw.key, str(error), unreadable=True)
    log.warning("%s: sample %s is left out: %s", bad.shard, bad.key, bad.reason)
    return _zeros(mixture, draw), bad


def read_pack(source: Mixture | Source, pack: Pack, skip: Collection[str] = (), *, run: Callable = map,
              on_bad: Callable[[BadSample], None] | None = None) -> list[Sample]:
    """The samples of a pack, one for each draw, in its order.

    A corrupt sample, one that could not be read at any attempt of the storage, and one whose key is in `skip` come back
    as zeros with `valid=False`. `on_bad` is told of the first two, in order; those of `skip` are not read again. `run`
    maps a function over the draws in order (an executor's `map` reads several at a time). Where there is CUDA, the bits
    lie in pinned memory.
    """
    mixture = Mixture.of(source)
    samples = []
    for sample, bad in run(lambda draw: _read_draw(mixture, draw, skip), pack.draws):
        samples.append(sample)
        if bad and on_bad:
            on_bad(bad)
    return _pinned(samples) if samples and torch.cuda.is_available() else samples


def _pinned(samples: list[Sample]) -> list[Sample]:
    """The samples with their bits side by side in pinned memory, from which a GPU copies without waiting."""
    sizes = [sample.bits.size for sample in samples]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    views = [view.numpy() for view in memory.split(sizes)]
    for sample, view in zip(samples, views):
        view[:] = sample.bits
    return [replace(sample, bits=view) for sample, view in zip(samples, views)]


class PackLoader:
    """Iterator of StepData without end: the steps after `state`, read ahead by a background thread.

    Use it as a context manager, or call `close`.
    """

    def __init__(self, plan: Plan, state: DataState, *, packs_per_step: int | Callable[[int], int], cost: Cost,
                 gamma: float, step: int = 0, dp_rank: int = 0, dp_size: int = 1, threads: int = 2, prefetch: int = 2,
                 renew: Callable[[Plan], Plan | None] | None = None) -> None:
        """packs_per_step: a number, or a function (`ramp.packs_of_step`) that gives it for step `step` (the first),
        step + 1, ...; it never changes what is in the packs. threads: samples read at a time; prefetch: steps read
        ahead, besides the one asked for. renew: called with the plan where an epoch begins, by the thread that asks for
        its first step; a plan that it gives (of grown datasets) is used from there on, and all processes must be given
        the same.

        packs_per_step must divide by dp_size (`config.check.check_layout`). Raises ConfigError where the training split
        has fewer packs than one step takes, or the state is not of this plan.
        """
        self._packs_at = packs_per_step if callable(packs_per_step) else lambda _: packs_per_step
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"there is no rank {dp_rank} of {dp_size}")
        _check_divides(self._packs_at(step), dp_size)
        check_step_size(plan, self._packs_at(step))
        plan.check_state(state)
        self._plan, self._cost, self._gamma = plan, cost, gamma
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._state, self._step, self._taken = state, step, state
        self._renew, self._epoch = renew, state.epoch
        self._closed = False
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="grn-read")
        # One thread, so that each step starts from the state the one before it left.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="grn-load")
        self._prefetch = prefetch
        self._ahead: deque[Future[StepData | None]] = deque()
        """Steps being read, in order; from an epoch's end on None until `renew` was called."""
        self._read_ahead(prefetch)

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        if self._closed:
            raise StopIteration
        try:
            self._read_ahead(self._prefetch + 1)
            step = self._ahead.popleft().result()
            if step is None:  # an epoch begins, and nothing of it is read yet
                self._begin_epoch()
                self._read_ahead(self._prefetch + 1)
                step = self._ahead.popleft().result()
            self._taken = step.state_after
            return step
        except BaseException:  # no step follows a failed one: stop the threads, and raise it again
            self.close()
            raise

    def close(self) -> None:
        """Stop reading ahead and wait for the threads; steps that were read are dropped. May be called twice."""
        self._closed = True
        self._loader.shutdown(cancel_futures=True)
        self._readers.shutdown()
        self._ahead.clear()

    def go_back(self, step: int) -> None:
        """Count the steps from `step` again, while the packs go on behind the last step taken. What was read ahead is
        read anew, because the steps may be of another size now."""
        for ahead in self._ahead:
            ahead.cancel()
        wait(self._ahead)
        self._ahead.clear()
        self._state, self._step = self._taken, step

    def _read_ahead(self, steps: int) -> None:
        while len(self._ahead) < steps:
            self._ahead.append(self._loader.submit(self._load))

    def _begin_epoch(self) -> None:
        for ahead in self._ahead:  # all of them find the new epoch not begun, so that nothing is loading after this
            ahead.result()
        self._ahead.clear()
        plan = self._renew(self._plan)
        if plan is not None:
            check_step_size(plan, self._packs_at(self._step))
            self._state = plan.take_over(self._state)
            self._plan = plan
        self._epoch = self._state.epoch

    def _load(self) -> StepData | None:
        """The next step; None where it is the first of an epoch that `renew` was not called for yet."""
        state, plan = self._state, self._plan
        if self._renew and state.epoch != self._epoch:
            return None
        count = self._packs_at(self._step)
        _check_divides(count, self._dp_size)
        packs, after = plan.next_step(state, count)
        costs = [self._cost.of(draw.tokens for draw in pack.draws) for pack in packs]
        mine = [packs[i] for i in assign(costs, self._dp_size)[self._dp_rank]]
        bad: list[BadSample] = []
        loaded = [LoadedPack(pack, read_pack(plan.mixture, pack, state.skip, run=self._readers.map, on_bad=bad.append))
                  for pack in mine]
        self._state = after.with_skips(sample.key for sample in bad if sample.unreadable)
        self._step += 1
        return StepData(packs, loaded, sample_weights(packs, self._gamma), self._state, bad)


def _check_divides(packs_per_step: int, dp_size: int) -> None:
    if packs_per_step % dp_size:
        raise ValueError(f"{packs_per_step} packs cannot be cut for {dp_size} ranks")


def check_step_size(plan: Plan, packs_per_step: int) -> None:
    """Raise ConfigError where an epoch is smaller than a step."""
    if plan.split == "train" and not plan.at_least(packs_per_step):
        packs = plan.packs_in_epoch(0)
        raise ConfigError(f"the dataset is too small for a step: an epoch of {plan.visits_in_epoch(0)} training "
                          f"samples is {packs} packs of {plan.token_budget} tokens, but data.packs_per_step is "
                          f"{packs_per_step}. Set data.packs_per_step to at most {packs}, data.token_budget lower, or "
                          "add samples")

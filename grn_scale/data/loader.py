"""From planned packs to the samples of each step, read ahead in the background.

A step's packs are the plan's; this file only reads those of one data-parallel rank. A sample that cannot be read
keeps its slot with `valid=False`, so packs, weights and the other ranks' work never change. The
ranks that share a copy of the model compare their flags afterwards (`parallel.groups.agree`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from grn_scale.batch import Draw, Pack, Sample
from grn_scale.data.packing import Cost, assign
from grn_scale.data.plan import DataState, Index, Plan, sample_weights
from grn_scale.data.schema import IndexRow
from grn_scale.data.shards import CorruptSample
from grn_scale.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 1.0)
"""Pauses before the second and the third attempt at a read that failed."""


class Source(Index, Protocol):
    """A dataset to read from (grn_scale.data.shards.Dataset); its methods are called from several threads."""

    def locate(self, row: int) -> IndexRow: ...

    def read_bits(self, row: IndexRow) -> np.ndarray: ...

    def read_text(self, key: str) -> torch.Tensor: ...


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


def _retried(read: Callable[[], T]) -> T:
    for pause in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            log.warning("read failed, trying again in %s s: %s", pause, error)
            time.sleep(pause)
    return read()


def read_sample(dataset: Source, draw: Draw) -> Sample:
    """The draw with its bits and text states.

    Raises CorruptSample for bytes that are not what the index says, and OSError for a read that failed three times.
    """
    row, info = dataset.locate(draw.row), dataset.info
    bits = _retried(lambda: dataset.read_bits(row))
    if bits.size != _packed_bytes(dataset, draw):
        raise CorruptSample(_shard_name(dataset, draw), draw.key, f"it has {bits.size} bytes, but {draw.thw} latent "
                            f"cells take {_packed_bytes(dataset, draw)}")
    states = _retried(lambda: dataset.read_text(draw.text_key))
    planned = (draw.text_tokens, info.text_hidden_size)
    if tuple(states.shape) != planned:
        raise CorruptSample(_shard_name(dataset, draw), draw.key, f"its text {draw.text_key} has states of shape "
                            f"{tuple(states.shape)}, but the index says {planned}")
    return Sample(draw, bits, states)


def _packed_bytes(dataset: Source, draw: Draw) -> int:
    return (draw.visual_tokens * dataset.info.latent_channels * dataset.info.rounds + 7) // 8


def _shard_name(dataset: Source, draw: Draw) -> str:
    return dataset.info.video_shards[dataset.locate(draw.row).shard].name


def _zeros(dataset: Source, draw: Draw) -> Sample:
    bits = np.zeros(_packed_bytes(dataset, draw), dtype=np.uint8)
    states = torch.zeros(draw.text_tokens, dataset.info.text_hidden_size, dtype=torch.bfloat16)
    return Sample(draw, bits, states, valid=False)


def _read_draw(dataset: Source, draw: Draw, skip: Collection[str]) -> tuple[Sample, BadSample | None]:
    if draw.key in skip:
        return _zeros(dataset, draw), None
    try:
        return read_sample(dataset, draw), None
    except CorruptSample as error:
        bad = BadSample(error.shard, draw.key, error.reason, unreadable=False)
    except OSError as error:
        bad = BadSample(_shard_name(dataset, draw), draw.key, str(error), unreadable=True)
    log.warning("%s: sample %s is left out: %s", bad.shard, bad.key, bad.reason)
    return _zeros(dataset, draw), bad


def read_pack(dataset: Source, pack: Pack, skip: Collection[str] = (), *, run: Callable = map,
              on_bad: Callable[[BadSample], None] | None = None) -> list[Sample]:
    """The samples of a pack, one for each draw, in its order.

    A corrupt sample, one whose reading failed three times, and one whose key is in `skip` come back as zeros with
    `valid=False`. `on_bad` is told of the first two, in order; those of `skip` are not read again. `run` maps a
    function over the draws in order (an executor's `map` reads several at a time).
    """
    samples = []
    for sample, bad in run(lambda draw: _read_draw(dataset, draw, skip), pack.draws):
        samples.append(sample)
        if bad and on_bad:
            on_bad(bad)
    return samples


class PackLoader:
    """Iterator of StepData without end: the steps after `state`, read ahead by a background thread.

    Use it as a context manager, or call `close`. To change packs_per_step, close it and make another one from the
    last step's `state_after`.
    """

    def __init__(self, dataset: Source, plan: Plan, state: DataState, *, packs_per_step: int, cost: Cost,
                 gamma: float, dp_rank: int = 0, dp_size: int = 1, threads: int = 2, prefetch: int = 2) -> None:
        """threads: samples read at a time; prefetch: steps read ahead, besides the one asked for.

        packs_per_step must divide by dp_size (`config.check.check_layout`). Raises ConfigError where the training split
        has fewer packs than one step takes, or the state is not of this plan.
        """
        check_step_size(plan, packs_per_step)
        if not 0 <= dp_rank < dp_size or packs_per_step % dp_size:
            raise ValueError(f"{packs_per_step} packs cannot be cut for rank {dp_rank} of {dp_size}")
        plan.check_state(state)
        self._dataset, self._plan = dataset, plan
        self._packs_per_step, self._cost, self._gamma = packs_per_step, cost, gamma
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._state = state
        self._closed = False
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="grn-read")
        # One thread, so that each step starts from the state the one before it left.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="grn-load")
        self._ahead = deque(self._loader.submit(self._load) for _ in range(prefetch))

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[StepData]:
        return self

    def __next__(self) -> StepData:
        if self._closed:
            raise StopIteration
        self._ahead.append(self._loader.submit(self._load))
        try:
            return self._ahead.popleft().result()
        except BaseException:  # no step follows a failed one: stop the threads, and raise it again
            self.close()
            raise

    def close(self) -> None:
        """Stop reading ahead and wait for the threads; steps that were read are dropped. May be called twice."""
        self._closed = True
        self._loader.shutdown(cancel_futures=True)
        self._readers.shutdown()
        self._ahead.clear()

    def _load(self) -> StepData:
        state = self._state
        packs, after = self._plan.next_step(state, self._packs_per_step)
        costs = [self._cost.of(draw.tokens for draw in pack.draws) for pack in packs]
        mine = [packs[i] for i in assign(costs, self._dp_size)[self._dp_rank]]
        bad: list[BadSample] = []
        loaded = [LoadedPack(pack, read_pack(self._dataset, pack, state.skip, run=self._readers.map, on_bad=bad.append))
                  for pack in mine]
        self._state = after.with_skips(sample.key for sample in bad if sample.unreadable)
        return StepData(packs, loaded, sample_weights(packs, self._gamma), self._state, bad)


def check_step_size(plan: Plan, packs_per_step: int) -> None:
    """Raise ConfigError where an epoch is smaller than a step."""
    if plan.split == "train" and not plan.at_least(packs_per_step):
        packs = plan.packs_in_epoch(0)
        raise ConfigError(f"the dataset is too small for a step: an epoch of its {plan.samples} training samples is "
                          f"{packs} packs of {plan.token_budget} tokens, but data.packs_per_step is {packs_per_step}. "
                          f"Set data.packs_per_step to at most {packs}, data.token_budget lower, or add samples")

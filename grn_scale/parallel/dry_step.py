"""One rank of a dry run: its engine is built and takes one step without storage, without peers, without a GPU.

    python -m grn_scale.parallel.dry_step < config.json    # started by dry_run.py in a fake environment; prints JSON
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from grn_scale.batch import Draw, Sample
from grn_scale.config.load import build
from grn_scale.config.schema import Config
from grn_scale.model.pack import PackedBatch, assemble
from grn_scale.parallel import groups
from grn_scale.parallel.fake_world import fake_groups, fake_tensors
from grn_scale.parallel.memory_meter import MemoryMeter, storage_bytes
from grn_scale.parallel.placement import Placement


def full_pack(config: Config, device: torch.device) -> PackedBatch:
    """This process's part of a pack that one video with a long caption fills: tensors with storage."""
    model, budget = config.model, config.data.token_budget
    words = min(config.text.max_tokens, budget // 2)
    frames = budget - words - 1
    draw = Draw(0, "dry run", 0, (frames, 1, 1), 1.0, "T2V", -1, words)
    bits = np.zeros((frames * model.bits_per_token + 7) // 8, np.uint8)
    sample = Sample(draw, bits, torch.zeros(words, model.text_hidden_size, dtype=torch.bfloat16))
    return assemble([sample], {0: 1.0}, config=model, noise=config.noise, seed=config.seed, length=budget,
                    device=device, part=groups.context_parallel())


def enough_micro_batches(config: Config, replicas: int) -> int:
    """Micro-batches after which the schedule holds no more activations than before, of those that a step has."""
    parallel = config.parallel
    filled = parallel.pipeline * (2 if parallel.virtual_pipeline > 1 else 1)
    return min(config.data.packs_per_step // replicas, filled)


def dry_step(config: Config) -> dict[str, Any]:
    """What this process, which the environment places in a fake world, holds: fields of `dry_run.RankClass`."""
    begin = time.perf_counter()
    with fake_groups(config.parallel) as device:
        # only now is the process prepared for what these import
        from grn_scale.parallel.engine import TrainEngine
        from grn_scale.parallel.zero import held_gradients

        class Watched(TrainEngine):
            """Takes readings when backward is done and the update has not begun."""

            def _score(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                scores = super()._score(*args, **kwargs)
                self.held, self.most = meter.live, meter.peak
                self.gradients = storage_bytes(held_gradients(self.engine))
                return scores

        # DeepSpeed collects garbage again and again; the libraries' own objects stay anyway
        gc.freeze()
        replicas = groups.data_parallel()[1]
        batch, micro_batches = full_pack(config, device), enough_micro_batches(config, replicas)
        with fake_tensors(), MemoryMeter() as meter:
            engine = Watched(config, device)
            # AdamW makes its moments in the first step: as later steps find them, they are there before
            engine.restore_chunks(updates=1)
            meter.restart_peak()
            engine.train_step([batch] * micro_batches, config.optimizer.lr)
            weights, average = storage_bytes(engine.parameters.values()), storage_bytes(engine.averages)
            moments = [value for state in engine.optimizer.state.values() for value in state.values()]
            # without ZeRO the optimizer steps on the weights themselves
            optimizer = storage_bytes([*engine.parameters.values(), *engine.masters, *moments]) - weights
        batches = storage_bytes(_tensors(batch)) * (config.data.packs_per_step // replicas)
        known = weights + engine.gradients + optimizer + average
        return {
            "parameters": sum(parameter.numel() for parameter in engine.parameters.values()),
            "tensors": _official_tensors(engine.placements.values(), config.parallel.tensor),
            "bytes": {"weights": weights, "gradients": engine.gradients, "optimizer": optimizer, "average": average,
                      "batches": batches, "buffers": engine.held - known, "activations": engine.most - engine.held,
                      "peak": meter.peak + batches},
            "micro_batches": micro_batches, "seconds": time.perf_counter() - begin}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested dataclasses and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def _official_tensors(placements: Iterable[Placement], tensor_size: int) -> dict[str, int]:
    held: dict[str, int] = {}
    for placement in placements:
        parts = 1 if placement.split_dim is None else tensor_size
        for piece in placement.pieces:
            held[piece.name] = held.get(piece.name, 0) + parts * math.prod(piece.size)
    return held


def main() -> None:
    """The configuration comes on stdin, the result goes to stdout."""
    # both ask for what tensors without storage do not have: an address, an equal state of the generator
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = build(Config, json.load(sys.stdin))
    json.dump(dry_step(config), sys.stdout)


if __name__ == "__main__":
    main()

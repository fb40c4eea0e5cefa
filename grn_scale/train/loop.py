"""The training loop, top to bottom. A batch comes from `data.loader`, is corrupted and packed by `model.pack`, and
scored and learned from by `parallel.engine`; there is no branch on the layout here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.batch import Draw, Sample
from grn_scale.config.schema import Config
from grn_scale.data.ledger import record_step
from grn_scale.data.loader import PackLoader, StepData
from grn_scale.data.state import DataState
from grn_scale.errors import DoNotRequeue
from grn_scale.model.loss import noise_bin_means
from grn_scale.model.pack import PackedBatch
from grn_scale.train.bad_samples import BadSamples
from grn_scale.train.metrics import MetricsLog
from grn_scale.train.progress import TrainingProgress
from grn_scale.train.schedule import learning_rate

if TYPE_CHECKING:  # importing it loads megatron-core, which has to wait for `parallel.groups.start`
    from grn_scale.parallel.engine import StepResult, TrainEngine


@dataclass(frozen=True)
class Position:
    """How far a run has come: what a checkpoint keeps besides tensors."""

    step: int
    """Steps done."""
    samples_seen: int
    data: DataState


@dataclass(frozen=True)
class Run:
    """What one training run is composed of (`pretrain/train.py` composes it)."""

    config: Config
    engine: TrainEngine
    loader: PackLoader
    assemble: Callable[[Sequence[Sequence[Sample]], dict[int, float]], list[PackedBatch]]
    """Samples of each pack and the step's loss weights -> the batches on the device."""
    validation: Sequence[PackedBatch]
    """This rank's held-out packs, corrupted once and for all; empty without validation."""
    bad_samples: BadSamples
    ledger: Path | None
    """File that gets a line for each step; None on all processes but the first, and without data.ledger."""
    metrics: MetricsLog
    progress: TrainingProgress
    save: Callable[[Position], None]
    """Write a checkpoint."""
    flops: Callable[[Sequence[Draw]], int]
    """FLOPs of training on these draws."""
    peak_flops: float | None
    """Of all devices together; None where it is not known."""


def train(run: Run, position: Position) -> None:
    """Train from `position` to config.train.steps; DoNotRequeue when too many samples are bad, or too many steps in a
    row are not finite."""
    settings, not_finite = run.config.train, 0
    while position.step < settings.steps:
        if settings.validate_every and position.step % settings.validate_every == 0:
            validate(run, position.step)

        begin = time.perf_counter()
        data = next(run.loader)
        batches = run.assemble([pack.samples for pack in data.micro_batches], data.weights)
        data_wait = time.perf_counter() - begin

        rate = learning_rate(position.step, run.config.optimizer.lr, run.config.schedule, settings.steps)
        result = run.engine.train_step(batches, rate)
        samples = sum(len(pack.draws) for pack in data.packs)
        position = Position(position.step + 1, position.samples_seen + samples, data.state_after)

        if run.ledger:
            record_step(run.ledger, position.step, data.packs, data.state_after.snapshot)
        row = metrics_row(run, data, result, rate, data_wait, time.perf_counter() - begin)
        run.metrics.write(position.step, row)
        run.progress.step(position.step, row)
        if result.sums.bad_samples:
            run.bad_samples.add(position.step, data.bad)
        not_finite = 0 if result.applied else not_finite + 1
        if not_finite >= settings.nonfinite_limit:
            raise DoNotRequeue(
                f"{not_finite} steps in a row had a loss or gradient that is not finite (train.nonfinite_limit), the "
                f"last is step {position.step}: lower optimizer.lr, or look at the samples of these steps")

        if position.step % settings.checkpoint_every == 0 or position.step == settings.steps:
            run.save(position)
    if settings.validate_every:
        validate(run, position.step)


def validate(run: Run, step: int) -> None:
    """Log the loss on held-out samples. Their noise is keyed by fixed draws, so evaluations differ by weights only."""
    sums = run.engine.evaluate(run.validation)
    means = noise_bin_means(sums.bins)
    labels = sums.bins[:, 2].sum().clamp(min=1)
    row = {"validation_loss": sums.loss, "validation_bad_samples": sums.bad_samples,
           "validation_bit_accuracy": (sums.bins[:, 1].sum() / labels).item(),
           **{f"validation_{name}": values for name, values in means.items()}}
    run.metrics.write(step, row)
    run.progress.validated(step, row)


def metrics_row(run: Run, data: StepData, result: StepResult, rate: float, data_wait: float, seconds: float) -> dict:
    """One row of metrics.jsonl: what a step learned, how much it read, and where its time went."""
    draws = [draw for pack in data.packs for draw in pack.draws]
    tokens = sum(draw.tokens for draw in draws)
    flops = run.flops(draws)
    row = {
        "loss": result.sums.loss, "gradient_norm": result.gradient_norm, "learning_rate": rate,
        "applied": int(result.applied), "samples": len(draws), "tokens": tokens,
        "fill": tokens / (len(data.packs) * run.config.data.token_budget), "bad_samples": result.sums.bad_samples,
        "step_seconds": seconds, "data_wait_seconds": data_wait,
        "forward_backward_seconds": result.forward_backward_seconds, "optimizer_seconds": result.optimizer_seconds,
        "tokens_per_second": tokens / seconds, "model_tflops_per_second": flops / seconds / 1e12,
        **noise_bin_means(result.sums.bins),
    }
    if run.peak_flops:
        row["mfu"] = flops / seconds / run.peak_flops
    return row

"""The training loop, top to bottom. A batch comes from `data.loader`, is corrupted and packed by `model.pack`, and
scored and learned from by `parallel.engine`; there is no branch on the layout here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.batch import Pack, Sample
from grn_scale.config.schema import Config
from grn_scale.data.ledger import record_step
from grn_scale.data.loader import PackLoader, StepData
from grn_scale.data.state import DataState
from grn_scale.errors import DoNotRequeue
from grn_scale.model.loss import noise_bin_means
from grn_scale.model.pack import PackedBatch
from grn_scale.train.bad_samples import BadSamples
from grn_scale.train.heartbeat import Heart
from grn_scale.train.metrics import MetricsLog
from grn_scale.train.profiling import StepProfiler
from grn_scale.train.progress import TrainingProgress
from grn_scale.train.rollback import Rollbacks
from grn_scale.train.schedule import learning_rate
from grn_scale.train.spikes import SpikeJudge, Verdict
from grn_scale.train.stopping import StopRequest
from grn_scale.train.stragglers import Stragglers

if TYPE_CHECKING:  # importing it loads megatron-core, which has to wait for `parallel.groups.start`
    from grn_scale.parallel.engine import StepResult, TrainEngine


@dataclass(frozen=True)
class Position:
    """How far a run has come: what a checkpoint keeps besides tensors."""

    step: int
    """Steps done."""
    samples_seen: int
    data: DataState
    batches: int
    """Global batches read: more than the steps where the run went back after a loss spike."""


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
    save: Callable[[Position, bool], float]
    """Write a checkpoint, or begin to, that is in doubt where the flag says so; seconds that the last finished one
    took."""
    spikes: SpikeJudge
    rollbacks: Rollbacks
    stop: StopRequest
    heart: Heart
    stragglers: Stragglers
    profiler: StepProfiler
    flops: Callable[[Sequence[Pack]], tuple[int, int]]
    """FLOPs of training on a step's packs: what the model needs, and what the devices carry out."""
    peak_flops: float | None
    """Of all devices together; None where it is not known."""


def train(run: Run, position: Position) -> bool:
    """Train from `position` to config.train.steps. True when they are done, False where the run was asked to stop: it
    then stands in a checkpoint, the one before where the last steps are in doubt.

    DoNotRequeue when too many samples are bad, too many steps in a row are not finite, or the loss spikes too often.
    """
    settings, spikes = run.config.train, run.spikes
    not_finite, save_due = 0, False
    while position.step < settings.steps:
        run.profiler.begin(position.step + 1)
        if settings.validate_every and position.step % settings.validate_every == 0:
            validate(run, position.step)

        begin = time.perf_counter()
        run.heart.enter("data", position.step + 1)
        data = next(run.loader)
        own_wait = time.perf_counter() - begin  # behind this, the processes that share a copy of the model meet
        batches = run.assemble([pack.samples for pack in data.micro_batches], data.weights)
        data_wait = time.perf_counter() - begin

        run.heart.enter("step", position.step + 1, [draw.key for one in data.micro_batches for draw in one.pack.draws])
        rate = learning_rate(position.step, run.config.optimizer.lr, run.config.schedule, settings.steps)
        result = run.engine.train_step(batches, rate, run.stop.votes())
        samples = sum(len(pack.draws) for pack in data.packs)
        position = Position(position.step + 1, position.samples_seen + samples, data.state_after, position.batches + 1)
        seconds = time.perf_counter() - begin
        run.stop.took("step", seconds)

        if run.ledger:
            record_step(run.ledger, position.batches, data.packs, data.state_after.snapshot)
        row = metrics_row(run, data, result, rate, data_wait, seconds)
        row |= run.stragglers.add(result.forward_backward_seconds, own_wait)
        run.metrics.write(position.step, row)
        run.progress.step(position.step, row)
        if result.sums.bad_samples:
            run.bad_samples.add(position.step, data.bad)
        not_finite = 0 if result.applied else not_finite + 1
        if not_finite:
            tell_not_finite(run, position.step, result, not_finite)

        verdict, stop = spikes.judge(position.step, result.sums.loss), run.stop.agreed(result.sums.votes)
        if verdict is Verdict.SPIKE and not stop:
            run.heart.enter("restore", position.step)
            reached = position.step
            position = run.rollbacks.go_back(position, spikes.rising_since, result.sums.loss, spikes.limit())
            if position.step < reached:  # else there is no checkpoint to go back to
                run.loader.go_back(position.step)
                save_due = False
                continue
        last, in_doubt = position.step == settings.steps, verdict is not Verdict.FINE or not_finite > 0
        save_due = save_due or last or bool(stop) or position.step % settings.checkpoint_every == 0
        if save_due and (last or not in_doubt):
            if in_doubt:
                run.progress.warn(f"the loss of the last step, {position.step}, is in doubt: it is saved under a name "
                                  "ending in .doubtful, from which nothing resumes, and the checkpoints before it stay")
            save(run, position, in_doubt)
            save_due = False
        if stop and not last:
            run.progress.warn(f"stopping after step {position.step}, since {stop}"
                              + (": not saved, its loss is in doubt" if in_doubt else ""))
            return False
    if settings.validate_every:
        validate(run, position.step)
    return True


def save(run: Run, position: Position, doubtful: bool) -> None:
    """Write a checkpoint, or begin to."""
    run.heart.enter("save", position.step)
    begin = time.perf_counter()
    written = run.save(position, doubtful)
    run.stop.took("save", max(written, time.perf_counter() - begin))


def tell_not_finite(run: Run, step: int, result: StepResult, count: int) -> None:
    """Tell of a step that changed no weights; DoNotRequeue where it is the last that may, with `count` in a row."""
    limit = run.config.train.nonfinite_limit
    what = "loss" if not math.isfinite(result.sums.loss) else "gradient"
    if count >= limit:
        raise DoNotRequeue(
            f"{count} steps in a row had a loss or gradient that is not finite (train.nonfinite_limit), the last is "
            f"step {step} (its {what}): lower optimizer.lr, or look at the samples of these steps")
    run.progress.warn(f"step {step} is skipped: its {what} is not finite ({count} in a row, at "
                      f"train.nonfinite_limit={limit} the run stops)")


def validate(run: Run, step: int) -> None:
    """Log the loss on held-out samples. Their noise is keyed by fixed draws, so evaluations differ by weights only."""
    run.heart.enter("validate", step)
    begin = time.perf_counter()
    sums = run.engine.evaluate(run.validation)
    run.stop.took("validate", time.perf_counter() - begin)
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
    model_flops, hardware_flops = run.flops(data.packs)
    row = {
        "loss": result.sums.loss, "gradient_norm": result.gradient_norm, "learning_rate": rate,
        "applied": int(result.applied), "packs": len(data.packs), "samples": len(draws), "tokens": tokens,
        "fill": tokens / (len(data.packs) * run.config.data.token_budget), "bad_samples": result.sums.bad_samples,
        "step_seconds": seconds, "data_wait_seconds": data_wait,
        "forward_backward_seconds": result.forward_backward_seconds, "optimizer_seconds": result.optimizer_seconds,
        "tokens_per_second": tokens / seconds, "model_tflops_per_second": model_flops / seconds / 1e12,
        **noise_bin_means(result.sums.bins),
    }
    if run.peak_flops:
        row["mfu"] = model_flops / seconds / run.peak_flops
        row["hfu"] = hardware_flops / seconds / run.peak_flops
    return row

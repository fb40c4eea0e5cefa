"""One optimizer step on any layout: megatron's schedule for forward and backward, DeepSpeed ZeRO for the update."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from grn_scale.checkpoint.chunks import Chunk
from grn_scale.class_to_image.batch import ClassBatch
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.schema import Config
from grn_scale.model.loss import NOISE_BINS, LabelLoss, noise_bin_sums
from grn_scale.model.pack import PackedBatch
from grn_scale.parallel.class_stage import ClassStage
from grn_scale.parallel.cpu_seam import schedule_device
from grn_scale.parallel.fragments import MOMENTS, fragment_chunks, seed_moments, update_average
from grn_scale.parallel.fused import adamw, choose, decay_groups
from grn_scale.parallel.groups import DeepSpeedTopology
from grn_scale.parallel.layers import layer_config
from grn_scale.parallel.stage import GRNStage
from grn_scale.parallel.zero import (
    after_skipped_step,
    deepspeed_config,
    drop_gradients,
    owned_fragments,
    publish_masters,
    release,
    sees_every_pass,
)

Batch = PackedBatch | ClassBatch


@dataclass(frozen=True)
class BatchSums:
    """What a global batch was scored with; equal on every rank."""

    loss: float
    """Weighted mean cross entropy (nats a label)."""
    bad_samples: int
    """Samples that counted nothing because their bytes could not be used."""
    bins: torch.Tensor
    """fp64 [NOISE_BINS, 3] on the CPU: cross entropy, right labels, labels."""
    votes: tuple[float, ...] = ()
    """Sums over all processes of the votes that each cast with its batches."""


@dataclass(frozen=True)
class StepResult:
    sums: BatchSums
    gradient_norm: float
    """Global norm before clipping."""
    applied: bool
    """False where loss or gradient was not finite: the weights did not change, on any rank."""
    forward_backward_seconds: float
    """Of this rank, before it waits for the others."""
    optimizer_seconds: float
    """Gradient reduction, clipping and update, with the wait."""


class TrainEngine:
    """The model of this rank and its optimizer. Weights start from (config.seed, official name)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.stages = [stage.to(device) for stage in self._build_stages()]
        self.schedule = get_forward_backward_func()
        # how many processes hold the same weights
        self.replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        self.parameters = {f"{i}.{name}": p for i, s in enumerate(self.stages) for name, p in s.named_parameters()}
        self.placements = {f"{i}.{name}": p for i, s in enumerate(self.stages) for name, p in s.placements.items()}
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        # DeepSpeed prints its memory use while it builds the optimizer; stdout is for results.
        with contextlib.redirect_stdout(io.StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=self.stages[0] if len(self.stages) == 1 else torch.nn.ModuleList(self.stages),
                optimizer=self._optimizer(), config=deepspeed_config(config, self.replicas, self.parameters.values()),
                mpu=DeepSpeedTopology(), dist_init_required=False)
        # reduce_gradients must take what the schedule has accumulated rather than wait for hooks
        self.engine.pipeline_parallelism = config.parallel.pipeline > 1
        self.optimizer = getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)
        self.fragments = owned_fragments(self.parameters, shapes, self.engine)
        for fragment in self.fragments:
            # a rank draws only what it owns a part of, and the masters take the drawn values before they are rounded
            stage, name = fragment.name.split(".", 1)
            values = self.stages[int(stage)].initial_value(name, config.seed).reshape(-1)
            fragment.of(fragment.flat).copy_(values.narrow(0, fragment.start, fragment.numel))
        publish_masters(self.engine)
        self.masters = [f.of(f.flat) for f in self.fragments]
        self.averages = [m.clone() for m in self.masters] if config.optimizer.ema_decay > 0 else []
        self.updates = 0

    def close(self) -> None:
        """Let the process forget it; its hooks would hold weights and process groups for ever."""
        release(self.engine)

    # -- steps ---------------------------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Batch], learning_rate: float, votes: Sequence[float] = ()) -> StepResult:
        """Update the weights with this rank's micro-batches of one global batch (the same number on each rank).

        votes: numbers that are summed over all processes with what the batch was scored with (`sums.votes`), so that
        processes agree on something without a collective of its own; as many on each.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        begin = time.perf_counter()
        scores = self._score(batches, forward_only=False)
        scored = time.perf_counter()
        sums = self._add_up(scores, votes)
        norm, applied = self._update(sums)
        return StepResult(sums, norm, applied, scored - begin, time.perf_counter() - scored)

    def _update(self, sums: BatchSums) -> tuple[float, bool]:
        """(global gradient norm, whether the weights changed)."""
        if not sees_every_pass(self.config.zero.stage):
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()
        # Without ZeRO nothing looks at the gradients before the weights change, so it is done here.
        norm = self._clip_replicated() if self.config.zero.stage == 0 else 0.0
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            drop_gradients(self.engine)
            after_skipped_step(self.engine)
            return math.nan, False
        self.engine.step()
        if self.config.zero.stage > 0:
            norm = float(self.engine.get_global_grad_norm())
        applied = math.isfinite(norm) and not getattr(self.engine.optimizer, "overflow", False)
        if not applied:
            after_skipped_step(self.engine)
        else:
            self.updates += 1
            if self.averages:
                update_average(self.averages, self.masters, self.config.optimizer.ema_decay)
        return norm, applied

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> BatchSums:
        """Loss of this rank's micro-batches and everyone else's; nothing is updated."""
        return self._add_up(self._score(batches, forward_only=True), ())

    def _score(self, batches: Sequence[Batch], forward_only: bool) -> torch.Tensor:
        """Forward and, if asked, backward; what this rank adds to the sums of all. Ends when the device has done it."""
        through = self._through_deepspeed if sees_every_pass(self.config.zero.stage) else self._through_schedule
        store = through(batches, forward_only)
        scores = torch.zeros(2 + NOISE_BINS * 3, dtype=torch.float64, device=self.device)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for sums in store:
                scores += sums
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return scores

    def _add_up(self, scores: torch.Tensor, votes: Sequence[float]) -> BatchSums:
        total = torch.cat((scores, torch.tensor(votes, dtype=torch.float64, device=self.device)))
        dist.all_reduce(total)
        total = total.cpu()
        return BatchSums(total[0].item(), int(total[1]), total[2:len(scores)].view(NOISE_BINS, 3),
                         tuple(total[len(scores):].tolist()))

    def _through_schedule(self, batches: Sequence[Batch], forward_only: bool) -> list[torch.Tensor]:
        """Forward and backward of every micro-batch by megatron's schedule; the last stage gets their reports."""

        def forward_step(iterator: Iterator[Batch], stage: GRNStage | ClassStage):
            batch = next(iterator)
            output = stage(batch)
            if not isinstance(output, LabelLoss):
                return output, None
            return output.weighted, lambda loss: self._fit_to_megatron(loss, output, batch)

        # every virtual chunk walks over the same micro-batches
        iterators = [iter(batches) for _ in self.stages]
        with schedule_device():
            return self.schedule(
                forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.stages if len(self.stages) > 1 else self.stages[0], num_microbatches=len(batches),
                seq_length=self.config.data.token_budget, micro_batch_size=1, forward_only=forward_only)

    def _through_deepspeed(self, batches: Sequence[Batch], forward_only: bool) -> list[torch.Tensor]:
        """As `_through_schedule`, where DeepSpeed must see every pass; gradients are reduced meanwhile."""
        store = []
        for i, batch in enumerate(batches):
            if not forward_only:
                self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            output = self.engine(batch)
            loss, _, report = self._fit_to_megatron(output.weighted, output, batch)
            if not forward_only:
                self.engine.backward(loss)
            store.append(report)
        return store

    def _fit_to_megatron(self, loss: torch.Tensor, output: LabelLoss, batch: Batch):
        """megatron's three values: the loss to differentiate, a token count (it divides by none), what to report.

        The weights of a global batch add up to 1 over all ranks; DeepSpeed averages gradients over the ranks that hold
        the same weights, so the factor makes that average the sum. The report is a copy, because the schedule may
        change the loss in place.
        """
        bins = noise_bin_sums(output, batch.ratio_N, batch.labels_N)
        bad = (batch.labels_N == 0).sum().double().view(1)
        if parallel_state.get_context_parallel_rank() > 0:
            # losses come from the tokens of this part of the sequence, samples and labels are counted for all of it
            bins[:, 2], bad = 0, bad * 0
        report = torch.cat((loss.detach().double().view(1), bad, bins.flatten()))
        return loss * self.replicas, torch.ones((), dtype=torch.int, device=loss.device), report

    def _clip_replicated(self) -> float:
        """Clip plain gradients by their global norm, and return it."""
        from deepspeed.runtime.utils import clip_grad_norm_

        return float(clip_grad_norm_(self.parameters.values(), self.config.optimizer.clip_norm,
                                     mpu=DeepSpeedTopology()))

    # -- state ---------------------------------------------------------------------------------------------

    def state_chunks(self) -> dict[str, list[Chunk]]:
        """Sections of a checkpoint as chunks of official parameters: fp32 masters ("model"), moments ("optimizer"),
        moving average ("ema"). The tensors are views of the live state."""
        sections = {"model": self._chunks(self.masters), "optimizer": []}
        if self.config.optimizer.name == "adamw" and self.updates > 0:
            for key in MOMENTS:
                moments = [f.of(self.optimizer.state[f.flat][key]) for f in self.fragments]
                sections["optimizer"] += self._chunks(moments, f"{key}/")
        if self.averages:
            sections["ema"] = self._chunks(self.averages)
        return sections

    def restore_chunks(self, updates: int) -> dict[str, list[Chunk]]:
        """Sections as in `state_chunks`, to be filled in place; then comes `finish_restore`."""
        self.updates = updates
        self.optimizer.state.clear()  # moments of a state that is left do not belong to the one that is restored
        if self.config.optimizer.name == "adamw" and updates > 0:
            seed_moments(self.optimizer, {id(f.flat): f.flat for f in self.fragments}.values(), updates)
        return self.state_chunks()

    @torch.no_grad()
    def finish_restore(self, restart_average: bool = False) -> None:
        """Take the restored masters over into the parameters the network computes with, and where the checkpoint
        had no moving average, into a new one. A collective of the replicas."""
        publish_masters(self.engine)
        if restart_average:
            for average, master in zip(self.averages, self.masters):
                average.copy_(master)

    def _chunks(self, values: Sequence[torch.Tensor], prefix: str = "") -> list[Chunk]:
        return [chunk for fragment, value in zip(self.fragments, values)
                for chunk in fragment_chunks(fragment, self.placements[fragment.name], value, prefix)]

    # -- construction --------------------------------------------------------------------------------------

    def _build_stages(self) -> list[GRNStage | ClassStage]:
        """This rank's part of the model: a stage for each virtual chunk, or the whole class-to-image model."""
        model, parallel = self.config.model, self.config.parallel
        if isinstance(model, ClassModelConfig):
            return [ClassStage(model, self.dtype)]
        layers = layer_config(model, parallel, choose(self.config.kernels, self.device, self.dtype), self.dtype)
        virtual = parallel.virtual_pipeline
        return [GRNStage(model, layers, i if virtual > 1 else None) for i in range(virtual)]

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        groups = decay_groups(self.parameters.values(), settings.weight_decay)
        if settings.name == "sgd":
            return torch.optim.SGD(groups, lr=settings.lr)
        return adamw(groups, settings, self.config.kernels.adamw)

"""The same training run twice: in plain torch on one process, and by the engine on any layout."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from grn_scale.batch import Draw, Sample
from grn_scale.checkpoint.chunks import narrow
from grn_scale.class_to_image import ClassGRN
from grn_scale.class_to_image import build_model as build_class_model
from grn_scale.class_to_image.batch import ClassBatch, batch_loss
from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    ZeroConfig,
)
from grn_scale.model import GRN, build_model
from grn_scale.model.loss import label_loss
from grn_scale.model.pack import PackedBatch, assemble
from grn_scale.train.schedule import learning_rate
from tests.helpers.class_parity import class_batches_of_step

PACKS, BUDGET = 4, 128
MODEL = ModelConfig(hidden_size=32, num_layers=4, num_heads=4, ffn_hidden_size=64, num_chunks=2, text_hidden_size=16,
                    latent_channels=4, rounds=4)


def parity_config(*, optimizer: str = "adamw", precision: str = "fp32", tensor: int = 1, sequence: bool = True,
                  pipeline: int = 1, virtual_pipeline: int = 1, context: int = 1, recompute: str = "none",
                  recompute_modules: tuple[str, ...] = ("mlp",), stage: int = 1, offload: bool = False,
                  model: ModelConfig = MODEL, seed: int = 3, lr: float | None = None,
                  clip_norm: float | None = None, warmup: int = 4, compile: str = "auto") -> Config:
    """Clipping is active: gradient norms of these models lie well above 0.05. The rate rises, then falls."""
    settings = OptimizerConfig(name=optimizer, lr=lr or (1e-3 if optimizer == "adamw" else 0.1),
                               clip_norm=clip_norm or 0.05, ema_decay=0.9, weight_decay=0.1)
    return Config(
        seed=seed, model=model, data=DataConfig(token_budget=BUDGET, packs_per_step=PACKS), optimizer=settings,
        schedule=ScheduleConfig(warmup_steps=warmup, warmup_start=0.2, kind="cosine" if warmup else "constant",
                                end_factor=0.1),
        noise=NoiseConfig(mean=-0.3), train=TrainConfig(precision=precision), zero=ZeroConfig(stage, offload),
        kernels=KernelsConfig(compile=compile),
        parallel=ParallelConfig(tensor=tensor, sequence=sequence, pipeline=pipeline,
                                virtual_pipeline=virtual_pipeline, context=context, recompute=recompute,
                                recompute_modules=recompute_modules))


def packs_of_step(step: int, config: Config, empty: bool = False) -> tuple[list[list[Sample]], dict[int, float]]:
    """PACKS packs of T2I, T2V and I2V samples of different length, and the loss weight of each draw.

    empty: every second pack has no sample, as in an epoch's last step.
    """
    rng = np.random.default_rng([config.seed, step])
    packs, draws, index = [], [], step * 1000
    for number in range(PACKS):
        samples, tokens = [], 0
        while not (empty and number % 2):
            t = int(rng.integers(1, 4))
            task = "T2I" if t == 1 else str(rng.choice(["T2V", "I2V"]))
            draw = Draw(index, f"k{index}", index, (t, int(rng.integers(2, 4)), int(rng.integers(2, 4))), 1.0, task,
                        -1, int(rng.integers(1, 8)))
            if tokens + draw.tokens > BUDGET:
                break
            bits = rng.integers(0, 256, draw.visual_tokens * config.model.bits_per_token // 8, dtype=np.uint8)
            states = rng.standard_normal((draw.text_tokens, config.model.text_hidden_size), dtype=np.float32)
            samples.append(Sample(draw, bits, torch.from_numpy(states)))
            draws.append(draw)
            tokens, index = tokens + draw.tokens, index + 1
        packs.append(samples)
    powers = {d.index: d.predicted_tokens**config.loss.gamma for d in draws}
    total = sum(powers.values())
    return packs, {i: power / total for i, power in powers.items()}


def batches_of_step(step: int, config: Config, packs: Sequence[int] | None = None,
                    empty: bool = False, part: tuple[int, int] = (0, 1)) -> list[PackedBatch] | list[ClassBatch]:
    if isinstance(config, ClassConfig):
        return class_batches_of_step(step, config, range(PACKS) if packs is None else packs, empty)
    samples, weights = packs_of_step(step, config, empty)
    chosen = range(PACKS) if packs is None else packs
    return [assemble(samples[i], weights, config=config.model, noise=config.noise, seed=config.seed,
                     length=BUDGET, device=torch.device("cpu"), part=part) for i in chosen]


@dataclasses.dataclass
class Trace:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Of the first step, before clipping."""


def plain_run(config: Config, steps: int, empty: bool = False,
              start: dict[str, torch.Tensor] | None = None) -> Trace:
    """Plain torch: fp32 masters, and in bf16 a bf16 copy of the model whose gradients are added up in fp32.

    start: weights to start from instead of the seed's.
    """
    build = build_class_model if isinstance(config, ClassConfig) else build_model
    model = build(config.model, config.seed)
    if start:
        model.load_state_dict(start, strict=False)
    masters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    if config.train.precision == "bf16":
        model = model.to(torch.bfloat16)
    settings = config.optimizer
    groups = [{"params": [p for p in masters.values() if p.dim() > 1], "weight_decay": settings.weight_decay},
              {"params": [p for p in masters.values() if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=settings.lr) if settings.name == "sgd" else torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)
    average = {name: p.detach().clone() for name, p in masters.items()}
    trace = Trace([], [], {}, average, {})
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(config, step, steps)
        loss_sum = 0.0
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        for batch in batches_of_step(step, config, empty=empty):
            loss = _loss(model, batch)
            model.zero_grad()
            loss.backward()
            loss_sum += loss.item()
            for name, p in model.named_parameters():
                masters[name].grad += p.grad.float()
        trace.losses.append(loss_sum)
        if step == 0:
            trace.gradients = {name: master.grad.clone() for name, master in masters.items()}
        trace.norms.append(torch.nn.utils.clip_grad_norm_(masters.values(), settings.clip_norm).item())
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
                average[name].lerp_(masters[name], 1 - settings.ema_decay)
    trace.weights = {name: p.detach() for name, p in masters.items()}
    return trace


def rate(config: Config | ClassConfig, step: int, steps: int) -> float:
    return learning_rate(step, config.optimizer.lr, config.schedule, steps)


def _loss(model: GRN | ClassGRN, batch: PackedBatch | ClassBatch) -> torch.Tensor:
    if isinstance(batch, ClassBatch):
        return batch_loss(model, batch).weighted
    return label_loss(model(batch.input), batch.targets_PD, batch.sample_P, batch.label_weight_N).weighted


def engine_run(config: Config, steps: int, empty: bool = False, start: dict[str, torch.Tensor] | None = None) -> dict:
    """One rank of the engine's run; every rank returns the chunks it owns. Arguments as of `plain_run`."""
    return engine_runs([(config, steps)], empty, start)[0]


def engine_run_in_buckets(config: Config, steps: int, elements: int) -> dict:
    """`engine_run` in which a collective carries so few elements that every step takes many."""
    from unittest import mock

    from grn_scale.parallel import zero

    with mock.patch.object(zero, "BUCKET", elements):
        return engine_run(config, steps)


def engine_runs(runs: Sequence[tuple[Config, int]], empty: bool = False,
                start: dict[str, torch.Tensor] | None = None) -> list[dict]:
    """`engine_run` of several configurations of one layout, in the same process groups: making those is what costs."""
    from megatron.core import parallel_state

    from grn_scale.parallel import groups

    device = groups.start(runs[0][0].parallel)
    try:
        return [_engine_run(config, steps, device, empty, start) for config, steps in runs]
    finally:
        parallel_state.destroy_model_parallel()


def _engine_run(config: Config, steps: int, device: torch.device, empty: bool,
                start: dict[str, torch.Tensor] | None) -> dict:
    from grn_scale.parallel import groups
    from grn_scale.parallel.engine import TrainEngine

    engine = TrainEngine(config, device)
    if start:
        _start_from(engine, start)
    rank, size = groups.data_parallel()
    losses, norms = [], []
    scored = engine.evaluate(batches_of_step(0, config, range(rank, PACKS, size), empty, groups.context_parallel()))
    for step in range(steps):
        batches = batches_of_step(step, config, range(rank, PACKS, size), empty, groups.context_parallel())
        result = engine.train_step(batches, rate(config, step, steps))
        assert result.applied
        losses.append(result.sums.loss)
        norms.append(result.gradient_norm)
    sections = engine.state_chunks()
    engine.close()
    return {"losses": losses, "norms": norms, "scored": scored.loss, **{
        name: [(c.name, c.global_shape, c.offset, c.tensor.detach().float().clone().numpy()) for c in chunks]
        for name, chunks in sections.items()}}


def _start_from(engine, weights: dict[str, torch.Tensor]) -> None:
    """Give the engine these weights, as a start from init.from does."""
    sections = engine.restore_chunks(0)
    with torch.no_grad():
        for chunk in sections["model"]:
            chunk.tensor.copy_(narrow(weights[chunk.name], chunk.offset, chunk.tensor.shape))
    engine.finish_restore(restart_average=True)


def run_with_a_poisoned_step(config: Config, where: str) -> dict:
    """Three steps, and the same three with one in between that is not finite; chunks of both runs.

    where: "loss" on every rank, or "gradient": of one parameter on rank 0 alone, with a sound loss.
    """
    from megatron.core import parallel_state

    from grn_scale.parallel import groups

    device = groups.start(config.parallel)
    from grn_scale.parallel.engine import TrainEngine

    try:
        found = {}
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for name, poisoned in (("clean", False), ("poisoned", True)):
            engine = TrainEngine(config, device)
            for step in range(3):
                batches = batches_of_step(step, config, range(rank, PACKS, size))
                if poisoned and step == 1:
                    result = _poisoned_step(engine, batches, where, first=rank == 0)
                    assert not result.applied and math.isfinite(result.sums.loss) == (where == "gradient")
                assert engine.train_step(batches, config.optimizer.lr).applied
            found[name] = [(c.name, c.global_shape, c.offset, c.tensor.detach().float().clone().numpy())
                           for c in engine.state_chunks()["model"]]
            engine.close()
        return found
    finally:
        parallel_state.destroy_model_parallel()


def _poisoned_step(engine, batches: list[PackedBatch], where: str, first: bool):
    if where == "loss":
        batches = [dataclasses.replace(b, label_weight_N=b.label_weight_N * torch.nan) for b in batches]
        return engine.train_step(batches, engine.config.optimizer.lr)
    parameter = next(iter(engine.parameters.values()))
    hook = parameter.register_hook(lambda gradient: gradient * torch.nan) if first else None
    result = engine.train_step(batches, engine.config.optimizer.lr)
    if hook:
        hook.remove()
    return result


def gather(results: list[dict], section: str) -> dict[str, torch.Tensor]:
    """Global tensors from the chunks of all ranks; every element must be covered."""
    tensors: dict[str, torch.Tensor] = {}
    for result in results:
        for name, shape, offset, values in result[section]:
            tensor = tensors.setdefault(name, torch.full(shape, torch.nan))
            tensor[tuple(slice(o, o + s) for o, s in zip(offset, values.shape))] = torch.from_numpy(values)
    assert not any(t.isnan().any() for t in tensors.values())
    return tensors

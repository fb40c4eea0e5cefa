"""Training speed: the engine on this job's processes, and beside it plain torch on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.perf.measure import paired, peak_memory, rates, repeat, spread, start_torch, wait
from grn_scale.perf.random_packs import random_packs

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from grn_scale.model.pack import PackedBatch


def bench_train(config: Config, repeats: int) -> dict[str, Any]:
    """Seconds a step and tokens a second of the training engine; on one process in turn with plain torch, and how much
    longer the engine takes (median over the pairs of steps)."""
    from grn_scale.config.check import check_layout
    from grn_scale.parallel import groups
    from grn_scale.parallel.dims import adopt_srun, world_size_from_environment

    adopt_srun()
    world_size = world_size_from_environment()
    check_layout(config, world_size)
    packs, weights = random_packs(config, config.tokenize.max_frames)
    start_torch(config.train.threads)
    device = groups.start(config.parallel)
    from grn_scale.parallel.engine import TrainEngine

    def mine(share: int, of: int) -> list[PackedBatch]:
        from grn_scale.model.pack import assemble

        return [assemble(pack, weights, config=config.model, noise=config.noise, seed=config.seed,
                         length=config.data.token_budget, device=device, part=groups.context_parallel())
                for pack in packs[share::of]]

    try:
        share, of = groups.data_parallel()
        assemble_seconds = repeat(lambda: mine(share, of), repeats)
        batches, results = mine(share, of), []
        engine = TrainEngine(config, device)

        def step() -> None:
            results.append(engine.train_step(batches, config.optimizer.lr))
            wait(device)

        plain = [_plain_step(config, batches, device)] if world_size == 1 else []
        seconds, *plain_seconds = paired([step, *plain], repeats)
    finally:
        groups.stop()
    timed, tokens = results[-repeats:], sum(sample.draw.tokens for pack in packs for sample in pack)
    report = {
        "processes": world_size, "tokens_per_step": tokens, "fill": tokens / (len(packs) * config.data.token_budget),
        "engine": {
            "step_seconds": spread(seconds), "tokens_per_second": rates(tokens, seconds),
            "forward_backward_seconds": spread([result.forward_backward_seconds for result in timed]),
            "optimizer_seconds": spread([result.optimizer_seconds for result in timed]),
            "assemble_seconds": spread(assemble_seconds), "peak_memory": peak_memory()},
    }
    if plain_seconds:
        (beside,) = plain_seconds
        report["plain_torch"] = {
            "about": f"weights, moments and gradients in {config.train.precision}, the same AdamW",
            "step_seconds": spread(beside), "tokens_per_second": rates(tokens, beside)}
        report["engine_over_plain"] = spread([mine / theirs for mine, theirs in zip(seconds, beside)])
    return report


def _plain_step(config: Config, batches: Sequence[PackedBatch], device: torch.device) -> Callable[[], None]:
    """The shortest training step one could write: the plain model, clipping and the same AdamW, no moving average."""
    import torch

    from grn_scale.model import build_model
    from grn_scale.model.loss import label_loss
    from grn_scale.parallel.fused import adamw, decay_groups

    model = build_model(config.model, config.seed)
    model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    groups = decay_groups(model.parameters(), config.optimizer.weight_decay)
    optimizer = adamw(groups, config.optimizer, config.kernels.adamw)

    def step() -> None:
        for batch in batches:
            label_loss(model(batch.input), batch.targets_PD, batch.sample_P, batch.label_weight_N).weighted.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        wait(device)

    return step

"""Training speed: the engine on this job's processes, and beside it plain torch on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError
from grn_scale.perf.measure import (
    CAPTION_TOKENS,
    latent_shape,
    paired,
    peak_memory,
    rates,
    repeat,
    spread,
    start_torch,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from grn_scale.batch import Pack, Sample
    from grn_scale.model.pack import PackedBatch

def bench_train(config: Config, repeats: int) -> dict[str, Any]:
    """Seconds a step and tokens a second of the training engine; on one process in turn with plain torch, and how much
    longer the engine takes (median over the pairs of steps)."""
    from grn_scale.config.check import check_layout
    from grn_scale.parallel import groups
    from grn_scale.parallel.dims import world_size_from_environment

    world_size = world_size_from_environment()
    check_layout(config, world_size)
    packs, weights = _random_packs(config)
    start_torch(config.train.threads)
    device = groups.start(config.parallel)
    from grn_scale.parallel.engine import TrainEngine

    def mine(share: int, of: int) -> list[PackedBatch]:
        from grn_scale.model.pack import assemble

        return [assemble(pack, weights, config=config.model, noise=config.noise, seed=config.seed,
                         length=config.data.token_budget, device=device) for pack in packs[share::of]]

    try:
        share, of = groups.data_parallel()
        assemble_seconds = repeat(lambda: mine(share, of), repeats)
        batches, results = mine(share, of), []
        engine = TrainEngine(config, device)

        def step() -> None:
            results.append(engine.train_step(batches, config.optimizer.lr))
            _wait(device)

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
            "about": f"weights, moments and gradients in {config.train.precision}, torch.optim.AdamW",
            "step_seconds": spread(beside), "tokens_per_second": rates(tokens, beside)}
        report["engine_over_plain"] = spread([mine / theirs for mine, theirs in zip(seconds, beside)])
    return report


def _plain_step(config: Config, batches: Sequence[PackedBatch], device: torch.device) -> Callable[[], None]:
    """The shortest training step one could write: the plain model, clipping and AdamW, no moving average."""
    import torch

    from grn_scale.model import build_model
    from grn_scale.model.loss import label_loss

    model = build_model(config.model, config.seed)
    model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=settings.betas, eps=settings.eps,
                                  weight_decay=settings.weight_decay)

    def step() -> None:
        for batch in batches:
            label_loss(model(batch.input), batch.targets_PD, batch.sample_P, batch.label_weight_N).weighted.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)

    return step


def _random_packs(config: Config) -> tuple[list[list[Sample]], dict[int, float]]:
    """Packs of one step, filled with clips of the configured shape and random labels, and the weight of each draw."""
    import numpy as np
    import torch

    from grn_scale.batch import Draw, Pack, Sample
    from grn_scale.data.plan import sample_weights

    (t, h, w), ratio_key = latent_shape(config.tokenize)
    length, budget = t * h * w + CAPTION_TOKENS + 1, config.data.token_budget
    if length > budget:
        raise ConfigError(f"a clip of the configured size has {length} tokens, but data.token_budget is {budget}: set "
                          f"data.token_budget={-(-length // 128) * 128} or more, or smaller clips "
                          "(tokenize.max_frames, tokenize.latent_side)")
    drawn = np.random.default_rng(config.seed)
    task = "T2V" if t > 1 else "T2I"

    def sample(index: int) -> Sample:
        bits = drawn.integers(0, 256, (t * h * w * config.model.bits_per_token + 7) // 8, dtype=np.uint8)
        states = drawn.standard_normal((CAPTION_TOKENS, config.model.text_hidden_size), np.float32)
        draw = Draw(index, f"clip{index}", index, (t, h, w), ratio_key, task, -1, CAPTION_TOKENS)
        return Sample(draw, bits, torch.from_numpy(states))

    count = budget // length
    packs = [[sample(number * count + i) for i in range(count)] for number in range(config.data.packs_per_step)]
    planned: list[Pack] = [Pack(0, number, tuple(s.draw for s in pack)) for number, pack in enumerate(packs)]
    return packs, sample_weights(planned, config.loss.gamma)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)

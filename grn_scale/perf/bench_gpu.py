"""How much of a GPU training uses: model FLOPs utilization for packs of several lengths, and what the rest goes to.

It measures the training engine on this job's processes, with as many layers of the model as fit; without a GPU the same
code runs on the CPU, where there is no utilization to speak of.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.perf.bench_kernels import bench_kernels
from grn_scale.perf.flops import hardware_flops, model_flops
from grn_scale.perf.measure import CAPTION_TOKENS, latent_shape, rates, repeat, spread, start_torch, wait
from grn_scale.perf.random_packs import random_packs

if TYPE_CHECKING:
    import torch

    from grn_scale.parallel.engine import TrainEngine

log = logging.getLogger("grn_scale.bench")
DEFAULT_CONFIG = "configs/runs/gpu.yaml"
FILLED = 0.9
"""Share of the free memory that a dry run may ask for: what it does not count is the allocator's and the libraries'."""


def bench_gpu(config: Config, tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    """Training steps with packs of each of these lengths, and the kernels beside each other for the first of them.

    mfu and hfu are None where the peak of the device is not known. ConfigError where a length holds no clip, UserError
    where not even one layer fits.
    """
    from grn_scale.config.check import check_layout
    from grn_scale.parallel import groups
    from grn_scale.parallel.dims import adopt_srun, world_size_from_environment

    adopt_srun()
    world_size = world_size_from_environment()
    if world_size != 1:
        raise ConfigError(f"bench gpu measures one GPU, but the job has {world_size} processes: start one; "
                          "`grn-scale bench train` measures any number")
    cases = [dataclasses.replace(config, data=dataclasses.replace(config.data, token_budget=budget))
             for budget in tokens]
    for case in cases:
        check_layout(case, world_size)
        _longest_clip(case)
    device = start_torch(config.train.threads)
    # before the device is in use: a dry run runs in processes of their own
    cases = [_cut(case, device) for case in cases]
    groups.start(config.parallel)
    try:
        kernels = bench_kernels(cases[0], device, tokens[0], repeats)
        steps = []
        for case in cases:
            steps.append(_as_many_layers_as_fit(case, config.model.num_layers, device, repeats))
        return {"device": _device_name(device), "kernels": kernels, "steps": steps}
    finally:
        groups.stop()


def _as_many_layers_as_fit(config: Config, layers: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """The report of a case, with fewer layers than the dry runs promised where the GPU's memory does not hold them;
    of one that does not fit with a single layer the reason in place of figures."""
    import torch

    while True:
        try:
            return _steps(config, layers, device, repeats)
        except torch.OutOfMemoryError as error:
            problem, fewer = str(error).partition("\n")[0], config.model.num_layers - 1
        finally:
            gc.collect()  # the engine refers to itself
            torch._dynamo.reset()  # each case compiles the same functions for sizes of its own, up to a limit
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if fewer < 1:
            return {"token_budget": config.data.token_budget, "layers": config.model.num_layers, "error": problem}
        log.warning("%d layers do not fit (%s): trying %d", fewer + 1, problem, fewer)
        config = _with_layers(config, fewer)


def _steps(config: Config, layers: int, device: torch.device, repeats: int) -> dict[str, Any]:
    import torch

    from grn_scale.model.pack import assemble
    from grn_scale.parallel.engine import TrainEngine
    from grn_scale.planning.hardware import peak_flops

    log.info("packs of %d tokens, %d of %d layers", config.data.token_budget, config.model.num_layers, layers)
    packs, weights = random_packs(config, _longest_clip(config))
    batches = [assemble(pack, weights, config=config.model, noise=config.noise, seed=config.seed,
                        length=config.data.token_budget, device=device) for pack in packs]
    draws = [sample.draw for pack in packs for sample in pack]
    lengths = [(draw.visual_tokens, draw.predicted_tokens, draw.text_tokens, draw.tokens) for draw in draws]
    needed = model_flops(config.model, lengths)
    done = hardware_flops(config.model, config.parallel, lengths, len(packs) * config.data.token_budget)
    peak = peak_flops(_device_name(device)) if device.type == "cuda" else None
    engine = TrainEngine(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def step() -> None:
        engine.train_step(batches, config.optimizer.lr)
        wait(device)

    seconds = repeat(step, repeats, warmup=3)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    profile = _profile(engine, batches, config.optimizer.lr, device)
    tokens = sum(draw.tokens for draw in draws)
    report = {
        "token_budget": config.data.token_budget, "layers": config.model.num_layers, "layers_of_the_model": layers,
        "tokens": tokens, "fill": tokens / (len(packs) * config.data.token_budget),
        "longest_segment": max(draw.tokens for draw in draws), "step_seconds": spread(seconds),
        "tokens_per_second": rates(tokens, seconds), "model_tflops_per_second": rates(needed / 1e12, seconds),
        "mfu": None if peak is None else rates(needed / peak, seconds),
        "hfu": None if peak is None else rates(done / peak, seconds), "cuda_peak_bytes": memory, "profile": profile}
    engine.close()
    return report


def _profile(engine: TrainEngine, batches: Sequence[Any], lr: float, device: torch.device) -> dict[str, Any]:
    """Where one step's time goes, by kind of kernel and by kernel."""
    import time

    import torch

    from grn_scale.perf.kernel_times import kernel_times

    with torch.profiler.profile() as recorded:
        begin = time.perf_counter()
        engine.train_step(batches, lr)
        wait(device)
        seconds = time.perf_counter() - begin
    return kernel_times(recorded, device, seconds)


def _longest_clip(config: Config) -> int:
    """Frames of the longest clip of tokenize.max_frames or fewer that fits a pack."""
    from grn_scale.data.buckets import GROUP_FRAMES, whole_groups

    budget, frames = config.data.token_budget, whole_groups(config.tokenize.max_frames)
    (_, h, w), _ = latent_shape(config.tokenize)
    fits = 1 + GROUP_FRAMES * ((budget - CAPTION_TOKENS - 1) // (h * w) - 1)
    if fits < 1:
        raise ConfigError(f"--tokens {budget} holds no frame of {h} x {w} latent cells (tokenize.latent_side): ask for "
                          f"{h * w + CAPTION_TOKENS + 1} tokens or more, or lower tokenize.latent_side")
    return min(fits, frames)


def _cut(config: Config, device: torch.device) -> Config:
    """The configuration with as many layers as fit the device's free memory, found by dry runs with one and two."""
    from grn_scale.parallel.dry_run import dry_run

    one, two = (dry_run(_with_layers(config, layers), 1).classes[0].bytes["peak"] for layers in (1, 2))
    free = _free_memory(device) * FILLED
    fit = int(1 + (free - one) // (two - one))
    if fit < 1:
        raise UserError(f"packs of {config.data.token_budget} tokens: one layer needs {one / 1e9:.1f} GB, but "
                        f"{free / 1e9:.1f} GB are free: ask for fewer --tokens, or set parallel.recompute=full")
    return _with_layers(config, min(fit, config.model.num_layers))


def _with_layers(config: Config, layers: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers, num_chunks=1))


def _free_memory(device: torch.device) -> int:
    import os

    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"

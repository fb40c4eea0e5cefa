"""The choices of `kernels` beside each other on the device at hand: attention, norms and the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grn_scale.config.kernel_schema import ATTENTION
from grn_scale.config.schema import Config
from grn_scale.perf.measure import repeat, spread, wait

if TYPE_CHECKING:
    import torch

SHARES = (1, 4, 16, 64)
"""A pack is divided into so many segments."""
SHORTEST = 32
"""Tokens of a segment; shorter ones are not measured."""


def bench_kernels(config: Config, device: torch.device, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each implementation, for one pack of `tokens` rows of config.model; what is missing says why.

    attention: by the tokens of a segment, forward and backward of one layer, with the TFLOP/s that the kernel reaches
    (its own products, those that it repeats in the backward pass included); norm: one norm over the width, forward and
    backward; update: AdamW of as many parameters as one layer has.
    """
    import torch

    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return {"tokens": tokens,
            "attention": {str(tokens // share): _attention(config, device, dtype, share, tokens // share, repeats)
                          for share in SHARES if tokens // share >= SHORTEST or share == 1},
            "norm": _norms(config, device, dtype, tokens, repeats), "update": _updates(config, device, repeats)}


def _attention(config: Config, device: torch.device, dtype: torch.dtype, count: int, length: int,
               repeats: int) -> dict[str, Any]:
    import torch

    from grn_scale.model.attention import packed_attention
    from grn_scale.model.attention_kernels import attention_kernels
    from grn_scale.model.sequence import Grid, lay_out

    model = config.model
    layout = lay_out([Grid((1, 1, length - 2), 1.0, 1)] * count, "v2", model.head_size).to(device)
    leaves = [torch.randn(layout.length, model.num_heads, model.head_size, device=device, dtype=dtype,
                          requires_grad=True) for _ in range(3)]
    # two products forward; backward the first of them again, and four
    flops = 14 * count * length**2 * model.hidden_size
    # on a CPU all choices are one
    names = [name for name in ATTENTION if name != "auto"] if device.type == "cuda" else ["sdpa"]

    def prepare(name: str) -> Callable[[], object]:
        kernels = attention_kernels(name, device, dtype)

        def work() -> None:
            out = packed_attention(*leaves, layout, kernels)
            torch.autograd.grad(out, leaves, out)
            wait(device)

        return work

    return _compare(names, prepare, repeats, lambda median: {"tflops_per_second": flops / median / 1e12})


def _norms(config: Config, device: torch.device, dtype: torch.dtype, tokens: int, repeats: int) -> dict[str, Any]:
    import torch

    from grn_scale.config.kernel_schema import KernelsConfig
    from grn_scale.parallel.fused import choose

    x = torch.randn(tokens, 1, config.model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(config.model.hidden_size, device=device, dtype=dtype, requires_grad=True)
    settings = {"torch": KernelsConfig(compile="never"), "compiled": KernelsConfig(compile="always"),
                "apex": KernelsConfig(compile="never", norm="apex")}

    def prepare(name: str) -> Callable[[], object]:
        norm = choose(settings[name], device, dtype).norm

        def work() -> None:
            out = norm(x, weight, 1e-6)
            torch.autograd.grad(out, (x, weight), out)
            wait(device)

        return work

    moved = 4 * x.numel() * x.element_size()  # read and written, forward and backward, at the least
    return _compare(settings, prepare, repeats, lambda median: {"gigabytes_per_second": moved / median / 1e9})


def _updates(config: Config, device: torch.device, repeats: int) -> dict[str, Any]:
    import torch

    from grn_scale.parallel.fused import adamw

    model = config.model
    weights = torch.zeros(4 * model.hidden_size**2 + 3 * model.hidden_size * model.ffn_hidden_size, device=device)
    weights.grad = torch.ones_like(weights)

    def prepare(name: str) -> Callable[[], object]:
        optimizer = adamw([{"params": [weights], "weight_decay": 0.1}], config.optimizer, name)

        def work() -> None:
            optimizer.step()
            wait(device)

        return work

    moved = 7 * weights.numel() * 4  # weight and two moments read and written, gradient read
    return _compare(("torch", "apex", "transformer_engine"), prepare, repeats,
                    lambda median: {"gigabytes_per_second": moved / median / 1e9})


def _compare(names: object, prepare: Callable[[str], Callable[[], object]], repeats: int,
             rate: Callable[[float], dict[str, float]]) -> dict[str, Any]:
    """By name: seconds and rate, or why it cannot be had here; and the quickest."""
    report: dict[str, Any] = {}
    for name in names:
        try:
            seconds = spread(repeat(prepare(name), repeats, warmup=2))
        except Exception as error:  # each library says in its own way that it has no kernel for this device or size
            report[name] = {"missing": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        else:
            rates = {key: float(f"{value:.4g}") for key, value in rate(seconds["median"]).items()}
            report[name] = {"seconds": seconds, **rates}
    measured = {name: each["seconds"]["median"] for name, each in report.items() if "seconds" in each}
    report["quickest"] = min(measured, key=measured.__getitem__)
    return report

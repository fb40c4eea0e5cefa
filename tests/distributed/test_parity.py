"""Layout invariance: every layout trains like one process in plain torch (20 steps, mixed T2I, T2V, I2V packs)."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from tests.helpers.parity import MODEL, Trace, gather, parity_config, plain_run
from tests.helpers.rank_pool import RankPools

STEPS = 20
LAYOUTS = {
    "one process": (1, {}),
    "one process, ZeRO-0": (1, {"stage": 0}),
    "TP2 with SP": (2, {"tensor": 2}),
    "TP2 without SP": (2, {"tensor": 2, "sequence": False}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 x VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2 ZeRO-1": (2, {"stage": 1}),
    "DP2 ZeRO-0": (2, {"stage": 0}),
    "TP2 with SP, full recompute": (2, {"tensor": 2, "recompute": "full"}),
}

TWICE = {("TP2 with SP", "sgd"), ("TP2 without SP", "adamw"), ("PP2 x VPP2", "sgd"), ("DP2 ZeRO-0", "sgd"),
         ("TP2 with SP, full recompute", "adamw")}
"""Layouts whose other optimizer is in the quick suite; these run with -m slow."""


def run(pools: RankPools, ranks: int, config, steps: int, empty: bool = False) -> list[dict]:
    return pools.run(ranks, "tests.helpers.parity:engine_run", config=config, steps=steps, empty=empty)


@lru_cache
def reference(steps: int, **settings) -> Trace:
    return plain_run(parity_config(**settings), steps)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("layout,optimizer", [
    pytest.param(layout, optimizer, marks=[pytest.mark.slow] * ((layout, optimizer) in TWICE))
    for layout in LAYOUTS for optimizer in ("sgd", "adamw")])
def test_training_equals_plain_torch_in_fp32(pools, layout: str, optimizer: str) -> None:
    ranks, settings = LAYOUTS[layout]
    expected = reference(STEPS, optimizer=optimizer)
    results = run(pools, ranks, parity_config(optimizer=optimizer, **settings), STEPS)
    assert all(r["losses"] == results[0]["losses"] for r in results)
    assert min(expected.norms) > 0.05, "clipping must be active in every step"
    for step in range(STEPS):
        assert abs(results[0]["losses"][step] - expected.losses[step]) <= 1e-5 * max(1, expected.losses[step]), step
        assert results[0]["norms"][step] == pytest.approx(expected.norms[step], rel=1e-4), step
    for section, tensors in (("model", expected.weights), ("ema", expected.average)):
        found = gather(results, section)
        assert found.keys() == tensors.keys()
        for name in tensors:
            assert relative(found[name], tensors[name]) <= 1e-4, (section, name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_tensor_of_the_first_step_equals_plain_torch(pools, layout: str) -> None:
    # SGD without clipping moves each weight by lr * gradient; a large lr keeps the digits of the gradient
    ranks, settings = LAYOUTS[layout]
    one_step = {"optimizer": "sgd", "lr": 100.0, "clip_norm": 1e9}
    expected = reference(1, **one_step)
    start = reference(0, **one_step).weights
    decay = {name: (0.1 if w.dim() > 1 else 0.0) * w for name, w in start.items()}
    found = gather(run(pools, ranks, parity_config(**one_step, **settings), 1), "model")
    for name, weight in expected.weights.items():
        want, got = ((start[name] - w) / 100.0 - decay[name] for w in (weight, found[name]))
        close = relative(got, want) <= 1e-4 or (got - want).norm() <= 1e-7 * expected.norms[0]
        assert close, (name, relative(got, want))


@pytest.mark.parametrize("layout", ["one process", "TP2 with SP", "PP2", "DP2 ZeRO-1"])
def test_training_in_bf16_follows_plain_torch_with_the_same_casts(pools, layout: str) -> None:
    ranks, settings = LAYOUTS[layout]
    expected = reference(STEPS, precision="bf16")
    result = run(pools, ranks, parity_config(precision="bf16", **settings), STEPS)[0]
    assert result["losses"][0] == pytest.approx(expected.losses[0], rel=1e-3)
    assert result["losses"][-1] == pytest.approx(expected.losses[-1], rel=2e-2)
    assert result["norms"] == pytest.approx(expected.norms, rel=2e-2)


def test_index_labels_and_layout_v1_are_split_over_tensor_ranks_too(pools) -> None:
    import dataclasses

    model = dataclasses.replace(MODEL, label_form="index", layout="v1")
    expected = reference(5, model=model)
    results = run(pools, 2, parity_config(model=model, tensor=2), 5)
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)


@pytest.mark.parametrize("precision,stage", [("fp32", 0), ("fp32", 1), ("bf16", 1)])
def test_a_rank_with_empty_packs_only_takes_part_in_the_step(pools, precision: str, stage: int) -> None:
    # every second pack is empty: under data parallelism rank 1 has no sample at all
    expected = plain_run(parity_config(precision=precision), 5, empty=True)
    config = parity_config(precision=precision, stage=stage)
    results = run(pools, 2, config, 5, empty=True)
    close = 1e-4 if precision == "fp32" else 2e-2
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=close)
    assert results[0]["norms"] == pytest.approx(expected.norms, rel=close)
    if precision == "fp32":
        found = gather(results, "model")
        assert all(relative(found[name], weight) <= 1e-4 for name, weight in expected.weights.items())


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("precision,stage", [("fp32", 0), ("fp32", 1), ("bf16", 1)])
def test_a_step_that_is_not_finite_is_skipped_on_every_rank_and_leaves_nothing_behind(
        pools, precision, stage, where) -> None:
    results = pools.run(2, "tests.helpers.parity:run_with_a_poisoned_step",
                        config=parity_config(precision=precision, stage=stage), where=where)
    clean, poisoned = gather(results, "clean"), gather(results, "poisoned")
    assert all(torch.equal(poisoned[name], weight) for name, weight in clean.items())

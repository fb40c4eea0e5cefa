"""The class-to-image model trains on every layout like one process in plain torch (20 steps)."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from grn_scale.config.class_schema import ClassConfig
from tests.helpers.class_parity import class_parity_config
from tests.helpers.parity import Trace, gather, plain_run
from tests.helpers.rank_pool import RankPools
from tests.unit.test_class_model import lively

STEPS = 20
LAYOUTS = {"one process": (1, 1), "DP2 ZeRO-1": (2, 1), "DP2 ZeRO-0": (2, 0)}
"""Name -> processes, ZeRO stage."""
HEAD_BIAS = "final_layer.linear.bias"


def run(pools: RankPools, ranks: int, config: ClassConfig, steps: int, **more) -> list[dict]:
    return pools.run(ranks, "tests.helpers.parity:engine_run", config=config, steps=steps, **more)


@lru_cache
def reference(steps: int, **settings) -> Trace:
    return plain_run(class_parity_config(**settings), steps)


@lru_cache
def trained(form: str) -> dict[str, torch.Tensor]:
    """Weights none of which is zero: at first only the head has a gradient at all."""
    return {name: p.detach() for name, p in lively(class_parity_config(form=form).model).named_parameters()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def undecided(expected: Trace, name: str) -> torch.Tensor:
    """bool: elements whose first gradient is 0 but for rounding, by the bound for gradients that are nearly zero.

    The head starts at zero, so at first every class of a label has the same probability, and the gradient of the
    head's bias is the difference of that probability and a class's share of the true labels. Where the share is just
    as large (of two classes: exactly half), the gradient is 0 and what is summed is rounding, which depends on the
    order of the sum (2.3e-10 in one process, 1.2e-10 in two, where the others are 4e-3). The first step of AdamW,
    lr * g / (|g| + eps), makes up to lr of it, whatever its size: no layout can be exact there, and with eps = 1e-6
    the difference falls by 100. SGD keeps such an element as small as it is.
    """
    gradient = expected.gradients[name]
    nothing = torch.zeros_like(gradient, dtype=torch.bool)
    return gradient.abs() <= 1e-7 * expected.norms[0] if name == HEAD_BIAS else nothing


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("layout,form", [*((layout, "bit") for layout in LAYOUTS), ("DP2 ZeRO-1", "index")])
def test_training_equals_plain_torch_in_fp32(pools, layout: str, form: str, optimizer: str) -> None:
    ranks, stage = LAYOUTS[layout]
    expected = reference(STEPS, optimizer=optimizer, form=form)
    config = class_parity_config(optimizer=optimizer, form=form, stage=stage)
    results = run(pools, ranks, config, STEPS)
    assert min(expected.norms) > config.optimizer.clip_norm, "clipping must be active in every step"
    for step in range(STEPS):
        assert abs(results[0]["losses"][step] - expected.losses[step]) <= 1e-5 * max(1, expected.losses[step]), step
        assert results[0]["norms"][step] == pytest.approx(expected.norms[step], rel=1e-4), step
    for section, tensors in (("model", expected.weights), ("ema", expected.average)):
        found = gather(results, section)
        assert found.keys() == tensors.keys()
        for name, want in tensors.items():
            loose = undecided(expected, name) if optimizer == "adamw" else torch.zeros_like(want, dtype=torch.bool)
            assert relative(found[name][~loose], want[~loose]) <= 1e-4, (section, name)
            assert ((found[name] - want)[loose].abs() <= config.optimizer.lr).all(), (section, name)


def test_the_case_of_a_gradient_that_is_rounding_alone_occurs() -> None:
    expected = reference(STEPS, optimizer="adamw", form="bit")
    assert undecided(expected, HEAD_BIAS).tolist().count(True) == 2  # both classes of one label


@pytest.mark.parametrize("form", ["bit", "index"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_tensor_equals_plain_torch(pools, layout: str, form: str) -> None:
    # SGD without clipping moves each weight by lr * gradient; a large lr keeps the digits of the gradient
    ranks, stage = LAYOUTS[layout]
    config = class_parity_config(optimizer="sgd", lr=100.0, clip_norm=1e9, form=form, stage=stage)
    start = trained(form)
    expected = plain_run(config, 1, start=start)
    assert all(gradient.any() for gradient in expected.gradients.values())
    found = gather(run(pools, ranks, config, 1, start=start), "model")
    for name, want in expected.gradients.items():
        decay = (0.1 if want.dim() > 1 else 0.0) * start[name]
        got = (start[name] - found[name]) / 100.0 - decay
        assert relative(got, want) <= 1e-4 or (got - want).norm() <= 1e-7 * expected.norms[0], name


@pytest.mark.parametrize("ranks,form", [(1, "bit"), (2, "bit"), (2, "index")])
def test_training_in_bf16_follows_plain_torch_with_the_same_casts(pools, ranks: int, form: str) -> None:
    expected = reference(STEPS, precision="bf16", form=form)
    result = run(pools, ranks, class_parity_config(precision="bf16", form=form), STEPS)[0]
    assert result["losses"][0] == pytest.approx(expected.losses[0], rel=1e-3)
    assert result["losses"][-1] == pytest.approx(expected.losses[-1], rel=2e-2)
    assert result["norms"] == pytest.approx(expected.norms, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_rank_without_images_takes_part_in_the_step(pools, precision: str) -> None:
    expected = plain_run(class_parity_config(precision=precision), 3, empty=True)
    results = run(pools, 2, class_parity_config(precision=precision), 3, empty=True)
    close = 1e-4 if precision == "fp32" else 2e-2
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=close)
    assert results[0]["norms"] == pytest.approx(expected.norms, rel=close)

"""A run saved at TP2 x DP2 ZeRO-1 goes on on any layout as if it had not been interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.helpers.layouts import Layout
from tests.helpers.parity import gather

SAVED_AT, STEPS = 6, 12
SAVED = Layout(data=2, tensor=2, stage=1)
RESUMED = [Layout(pipeline=2), Layout(data=4, stage=3), Layout()]
SLOWLY = [Layout(data=2, context=2, stage=2), Layout(pipeline=2, virtual_pipeline=2, recompute="full"),
          Layout(data=2, stage=0)]


IN_BF16 = [Layout(data=4, stage=3)]


@pytest.fixture(scope="module", params=["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(pools, precision, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Folder with the checkpoint, and what every rank reports at the end."""
    folder = tmp_path_factory.mktemp(precision)
    results = pools.run(SAVED.world, "tests.helpers.resumed_runs:first_part", config=config(SAVED, precision),
                        save_at=SAVED_AT, steps=STEPS, folder=str(folder))
    return folder, results


def config(layout: Layout, precision: str):
    return dataclasses.replace(layout, numbers=(precision, "adamw")).config()


def resumed(pools, folder: Path, layout: Layout, precision: str) -> list[dict]:
    return pools.run(layout.world, "tests.helpers.resumed_runs:second_part", config=config(layout, precision),
                     first=SAVED_AT, steps=STEPS, folder=str(folder))


def test_the_same_layout_continues_bit_for_bit(pools, uninterrupted, precision: str) -> None:
    folder, expected = uninterrupted
    results = resumed(pools, folder, SAVED, precision)
    assert results[0]["losses"] == expected[0]["losses"][SAVED_AT:]
    for section in ("model", "optimizer", "ema"):
        want, found = gather(expected, section), gather(results, section)
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want), section


@pytest.mark.parametrize("precision,layout", [*(("fp32", layout) for layout in RESUMED),
                                              *(pytest.param("fp32", layout, marks=pytest.mark.slow)
                                                for layout in SLOWLY),
                                              *(pytest.param("bf16", layout, marks=pytest.mark.slow)
                                                for layout in IN_BF16)],
                         indirect=["precision"], ids=str)
def test_another_layout_continues_within_the_bounds(pools, uninterrupted, precision: str, layout: Layout) -> None:
    folder, expected = uninterrupted
    results = resumed(pools, folder, layout, precision)
    close = 1e-5 if precision == "fp32" else 2e-2
    assert results[0]["losses"] == pytest.approx(expected[0]["losses"][SAVED_AT:], rel=close)
    if precision == "fp32":
        for section in ("model", "optimizer", "ema"):
            want, found = gather(expected, section), gather(results, section)
            assert found.keys() == want.keys()
            for name, tensor in want.items():
                assert ((found[name] - tensor).norm() <= 1e-4 * tensor.norm().clamp(min=1e-12)).item(), (section, name)

"""Layout invariance: every layout trains like one process in plain torch (20 steps, mixed T2I, T2V, I2V packs).

`--parity-seed N` and `--parity-shape hidden=..,layers=..,heads=..` repeat it with other numbers and another model.
The quick suite takes layouts on up to two processes in which every feature meets every ZeRO stage, and a few on four;
`-m slow` takes all others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from grn_scale.config.schema import ModelConfig
from tests.helpers.layouts import Layout, few, layouts
from tests.helpers.parity import MODEL, Trace, gather, parity_config, plain_run
from tests.helpers.rank_pool import RankPools

STEPS = 20
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
TWO_CUTS = (Layout(tensor=2, pipeline=2, virtual_pipeline=2, recompute="selective", numbers=("fp32", "sgd")),
            Layout(data=2, context=2, stage=2, recompute="full"))
COMPILED = [pytest.param({"compile": "always", **settings}, marks=[pytest.mark.slow, needs_compiler])
            for settings in ({"tensor": 2}, {"context": 2, "recompute": "selective"}, {"stage": 3})]
ONE_STEP = {"optimizer": "sgd", "lr": 100.0, "clip_norm": 1e9, "warmup": 0}
"""SGD without clipping moves each weight by lr * gradient; a large lr keeps the digits of the gradient."""


def shape_of(text: str) -> ModelConfig:
    """The tests' model with the fields of --parity-shape."""
    names = {"hidden": "hidden_size", "layers": "num_layers", "heads": "num_heads"}
    given = {names[key]: int(value) for key, _, value in (part.partition("=") for part in text.split(",") if part)}
    model = {"ffn_hidden_size": 2 * given.get("hidden_size", MODEL.hidden_size),
             "num_chunks": 2 if given.get("num_layers", MODEL.num_layers) % 2 == 0 else 1, **given}
    return dataclasses.replace(MODEL, **model)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        every = layouts(shape_of(metafunc.config.getoption("--parity-shape")))
        # two features that cut the model need four processes, which is slow on a few cores
        quick = {*few([layout for layout in every if layout.world <= 2]), *TWO_CUTS}
        metafunc.parametrize("layout", [pytest.param(layout, id=str(layout), marks=[] if layout in quick else
                                                     [pytest.mark.slow]) for layout in every])


@pytest.fixture(scope="module")
def numbers(request) -> dict:
    """Seed and model of all runs."""
    return {"seed": request.config.getoption("--parity-seed"),
            "model": shape_of(request.config.getoption("--parity-shape"))}


@dataclasses.dataclass
class Record:
    """The file of --parity-record, a JSON line for each layout that held; empty path: none. A matrix that was
    interrupted goes on where it stood."""

    path: str
    numbers: dict[str, object]

    def holds(self, layout: Layout) -> bool:
        if not self.path or not Path(self.path).exists():
            return False
        lines = map(json.loads, Path(self.path).read_text(encoding="utf-8").splitlines())
        return any({**line, **self.numbers} == line and line["layout"] == str(layout) for line in lines)

    def add(self, layout: Layout, measured: dict[str, float]) -> None:
        if self.path:
            line = {"layout": str(layout), "processes": layout.world, **self.numbers, **measured}
            with Path(self.path).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def record(request) -> Record:
    option = request.config.getoption
    return Record(option("--parity-record"), {"seed": option("--parity-seed"), "shape": option("--parity-shape")})


def run(pools: RankPools, ranks: int, config, steps: int, empty: bool = False) -> list[dict]:
    return pools.run(ranks, "tests.helpers.parity:engine_run", config=config, steps=steps, empty=empty)


@lru_cache
def reference(steps: int, **settings) -> Trace:
    return plain_run(parity_config(**settings), steps)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def test_layout_trains_like_plain_torch(pools, numbers, record: Record, layout: Layout) -> None:
    if record.holds(layout):
        pytest.skip(f"{record.path} has it")
    compare = in_bf16 if layout.precision == "bf16" else in_fp32
    measured = compare(pools, numbers, layout)
    bounds = {"loss": 1e-5, "norm": 1e-4, "weights": 1e-4, "average": 1e-4, "gradient": 1.0,
              "first loss, bf16": 1e-3, "last loss, bf16": 2e-2, "norm, bf16": 2e-2}
    assert {name: value for name, value in measured.items() if not value <= bounds[name]} == {}
    record.add(layout, measured)


def in_fp32(pools: RankPools, numbers: dict, layout: Layout) -> dict[str, float]:
    """Largest differences over 20 steps, and of the first step's gradients (in units of what is allowed: 1e-4 relative,
    or 1e-7 of the global norm)."""
    runs = [(layout.config(**numbers), STEPS), (layout.config(**numbers, **ONE_STEP), 1)]
    answers = pools.run(layout.world, "tests.helpers.parity:engine_runs", runs=runs)
    results, one_step = ([answer[i] for answer in answers] for i in range(len(runs)))
    mine, expected = results[0], reference(STEPS, optimizer=layout.optimizer, **numbers)
    assert min(expected.norms) > 0.05, "clipping must be active in every step"
    assert all(r["losses"] == mine["losses"] for r in results)
    assert mine["scored"] == pytest.approx(mine["losses"][0], rel=1e-6), "evaluation before the first step"
    found = {"loss": max(abs(a - b) / max(1, b) for a, b in zip(mine["losses"], expected.losses)),
             "norm": max(abs(a - b) / b for a, b in zip(mine["norms"], expected.norms)),
             "gradient": gradient_difference(numbers, gather(one_step, "model"))}
    for name, section, tensors in (("weights", "model", expected.weights), ("average", "ema", expected.average)):
        there = gather(results, section)
        assert there.keys() == tensors.keys()
        found[name] = max(relative(there[key], tensor) for key, tensor in tensors.items())
    return found


def gradient_difference(numbers: dict, after_one_step: dict[str, torch.Tensor]) -> float:
    expected, start = reference(1, **ONE_STEP, **numbers), reference(0, **ONE_STEP, **numbers).weights
    worst = 0.0
    for name, weight in expected.weights.items():
        decay = (0.1 if weight.dim() > 1 else 0.0) * start[name]
        want, got = ((start[name] - w) / 100.0 - decay for w in (weight, after_one_step[name]))
        worst = max(worst, min(relative(got, want) / 1e-4, ((got - want).norm() / (1e-7 * expected.norms[0])).item()))
    return worst


def in_bf16(pools: RankPools, numbers: dict, layout: Layout) -> dict[str, float]:
    """Relative differences from plain torch with the same casts."""
    expected = reference(STEPS, precision="bf16", **numbers)
    mine = run(pools, layout.world, layout.config(**numbers), STEPS)[0]
    losses = [abs(a - b) / b for a, b in zip(mine["losses"], expected.losses)]
    return {"first loss, bf16": losses[0], "last loss, bf16": losses[-1],
            "norm, bf16": max(abs(a - b) / b for a, b in zip(mine["norms"], expected.norms))}


@pytest.mark.parametrize("ranks,settings", [
    (2, {"tensor": 2}), pytest.param(4, {"tensor": 2, "context": 2}, marks=pytest.mark.slow)])
def test_index_labels_and_layout_v1_are_split_over_ranks_too(pools, ranks: int, settings: dict) -> None:
    model = dataclasses.replace(MODEL, label_form="index", layout="v1")
    expected = reference(5, model=model)
    results = run(pools, ranks, parity_config(model=model, **settings), 5)
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)


def test_heads_that_do_not_divide_by_the_context_are_shared_out_unevenly(pools) -> None:
    model = dataclasses.replace(MODEL, hidden_size=48, num_heads=6)
    expected = reference(5, model=model, optimizer="sgd")
    results = run(pools, 4, parity_config(model=model, optimizer="sgd", context=4), 5)
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)
    found = gather(results, "model")
    assert all(relative(found[name], weight) <= 1e-4 for name, weight in expected.weights.items())


@pytest.mark.parametrize("settings", [{"stage": 2, "recompute": "selective", "recompute_modules": ("core_attn",)},
                                      {"stage": 2, "offload": True}, {"stage": 3, "offload": True},
                                      *COMPILED])
def test_settings_beside_the_matrix_train_alike(pools, settings: dict) -> None:
    expected = reference(5)
    results = run(pools, 2, parity_config(**settings), 5)
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)
    found = gather(results, "model")
    assert all(relative(found[name], weight) <= 1e-4 for name, weight in expected.weights.items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_that_take_many_collectives_train_alike(pools, stage: int) -> None:
    expected, config = reference(5), parity_config(stage=stage)
    results = pools.run(2, "tests.helpers.parity:engine_run_in_buckets", config=config, steps=5, elements=2500)
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=1e-5)
    found = gather(results, "model")
    assert all(relative(found[name], weight) <= 1e-4 for name, weight in expected.weights.items())


@pytest.mark.parametrize("settings", [
    {"stage": 0}, {"stage": 1}, {"precision": "bf16"}, {"stage": 2}, {"stage": 3, "precision": "bf16"}, {"context": 2}],
    ids=str)
def test_a_rank_with_empty_packs_only_takes_part_in_the_step(pools, settings: dict) -> None:
    # every second pack is empty: under data parallelism rank 1 has no sample at all
    bf16 = settings.get("precision") == "bf16"
    expected = plain_run(parity_config(precision="bf16" if bf16 else "fp32"), 5, empty=True)
    results = run(pools, 2, parity_config(**settings), 5, empty=True)
    close = 2e-2 if bf16 else 1e-4
    assert results[0]["losses"] == pytest.approx(expected.losses, rel=close)
    assert results[0]["norms"] == pytest.approx(expected.norms, rel=close)
    if not bf16:
        found = gather(results, "model")
        assert all(relative(found[name], weight) <= 1e-4 for name, weight in expected.weights.items())


POISONED = [{"stage": 0}, {"stage": 1}, {"precision": "bf16"}, {"precision": "bf16", "stage": 2},
            {"precision": "bf16", "stage": 2, "offload": True}, {"precision": "bf16", "stage": 3}]
POISONED_SLOWLY = [{"stage": 2}, {"stage": 2, "offload": True}, {"stage": 3},
                   {"precision": "bf16", "stage": 3, "offload": True}]


@pytest.mark.parametrize("where", ["gradient", pytest.param("loss", marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [
    *POISONED, *(pytest.param(settings, marks=pytest.mark.slow) for settings in POISONED_SLOWLY)], ids=str)
def test_a_step_that_is_not_finite_is_skipped_on_every_rank_and_leaves_nothing_behind(
        pools, settings: dict, where) -> None:
    results = pools.run(2, "tests.helpers.parity:run_with_a_poisoned_step", config=parity_config(**settings),
                        where=where)
    clean, poisoned = gather(results, "clean"), gather(results, "poisoned")
    assert all(torch.equal(poisoned[name], weight) for name, weight in clean.items())

"""The megatron-core model against recorded tensors of the reference (golden/manifest.json), on several layouts.

The weights come the way a user's come: an official file, `grn-scale convert`, and `init.from`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from grn_scale.cli import main
from grn_scale.config.check import check_layout
from grn_scale.config.schema import ModelConfig
from grn_scale.errors import ConfigError
from tests.helpers.golden import ALL_CASES, CASES, GAMMA, GRADIENTS, LOGITS, LOSSES, GoldenCase, golden_state
from tests.helpers.golden_parallel import LR, golden_run_config
from tests.helpers.parity import gather
from tests.helpers.rank_pool import RankPools

LAYOUTS = {
    "one process": (1, {}),
    "TP2 with SP": (2, {"tensor": 2}),
    "TP2 without SP": (2, {"tensor": 2, "sequence": False}),
    "PP2": (2, {"pipeline": 2}),
}


def fits(model: ModelConfig, ranks: int, **parallel: object) -> bool:
    """Whether `train` would accept the layout: three heads do not divide by two ranks."""
    try:
        check_layout(golden_run_config(model, 128, **parallel), ranks)
    except ConfigError:
        return False
    return True


def of_model(layout: str, name: str) -> list[GoldenCase]:
    return [case for case in ALL_CASES if (case.layout, case.model) == (layout, name)]


RUNS = [pytest.param(parallel, layout, name, id=f"{parallel}-{layout}-{name}",
                     marks=[pytest.mark.slow] * (parallel == "TP2 without SP"))
        for parallel, (ranks, settings) in LAYOUTS.items() for layout in GAMMA for name in CASES["models"]
        if of_model(layout, name) and fits(of_model(layout, name)[0].config, ranks, **settings)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(layout, model) -> step folder of its converted weights."""
    folder, made = tmp_path_factory.mktemp("golden"), {}

    def checkpoint(layout: str, name: str) -> Path:
        if (layout, name) not in made:
            config = of_model(layout, name)[0].config
            values = {"latent_channels": config.latent_channels, "rounds": config.rounds,
                      "label_form": config.label_form, "num_heads": config.num_heads}
            official, shape = folder / f"{name}.pth", folder / f"{name}.yaml"
            torch.save(golden_state(name), official)
            shape.write_text(yaml.safe_dump(values))
            output = folder / f"{layout}-{name}"
            assert main(["convert", "--input", str(official), "--from", "official", "--layout", layout,
                         "--model", str(shape), "--to", "native", "--output", str(output)]) == 0
            made[layout, name] = output / "step-00000000"
        return made[layout, name]

    return checkpoint


@pytest.mark.parametrize("parallel,layout,name", RUNS)
def test_logits_losses_and_gradients_equal_the_reference(pools: RankPools, checkpoints, parallel: str, layout: str,
                                                         name: str) -> None:
    cases = of_model(layout, name)
    ranks, settings = LAYOUTS[parallel]
    config = golden_run_config(cases[0].config, max(case.budget for case in cases), **settings)
    results = pools.run(ranks, "tests.helpers.golden_parallel:engine_on_golden", config=config,
                        checkpoint=checkpoints(layout, name), cases=cases)
    for number, case in enumerate(cases):
        found = [result[number] for result in results]
        check_logits(case, found)
        check_losses(case, found)
        check_gradients(case, found)


def check_logits(case: GoldenCase, found: list[dict]) -> None:
    heads = sorted((f for f in found if "logits" in f), key=lambda f: f["channels"])
    edges = [f["channels"] for f in heads]
    assert [start for start, _ in edges] + [case.config.label_channels] == [0] + [stop for _, stop in edges]
    logits = torch.from_numpy(np.concatenate([f["logits"] for f in heads], axis=1))
    expected = torch.cat([case.of(i, "logits") for i in range(len(case.samples))])
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)


def check_losses(case: GoldenCase, found: list[dict]) -> None:
    labels = case.batch(0.0).labels_N
    for head in (f for f in found if "logits" in f):
        for kind, sums in (("loss", head["sample_loss"]), ("acc", head["sample_correct"])):
            means = torch.from_numpy(sums) / labels
            torch.testing.assert_close(means, case[f"per_sample_{kind}"], atol=LOSSES, rtol=0)
    for rank in found:
        for gamma, loss in rank["loss"].items():
            expected = (case.weights(gamma) * case["per_sample_loss"]).sum().item()
            assert loss == pytest.approx(expected, abs=LOSSES), gamma
        assert rank["loss"][GAMMA[case.layout]] == pytest.approx(case["final_loss"].item(), abs=LOSSES)


def check_gradients(case: GoldenCase, found: list[dict]) -> None:
    before, after = gather(found, "before"), gather(found, "after")
    assert all(torch.equal(before[name], weight) for name, weight in golden_state(case.model).items())
    norms = case.under("grad_norm/")
    assert before.keys() == norms.keys()
    gradients = {name: (before[name].double() - after[name].double()) / LR for name in before}
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=GRADIENTS), name
    for name, gradient in case.under("grad/").items():
        assert (gradients[name] - gradient).norm() <= GRADIENTS * gradient.norm(), name
    total = torch.stack(list(norms.values())).norm().item()
    assert [f["norm"] for f in found] == pytest.approx([total] * len(found), rel=GRADIENTS)

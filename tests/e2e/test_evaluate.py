"""`grn-scale evaluate` on a run that the real commands made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.clips import caption
from tests.helpers.jobs import grn_scale, train_arguments, write_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with a dataset and a run of two steps on it."""
    folder = write_dataset(tmp_path_factory.mktemp("evaluate"))
    grn_scale(*train_arguments(folder, folder / "run", "train.steps=2"))
    (folder / "prompts.txt").write_text("".join(f"{caption(n)} {'again ' * n}\n" for n in range(8)))
    return folder


def evaluate(made: Path, output: Path, *more: str, expect: int = 0):
    return grn_scale("evaluate", "--run", f"{made}/run", "--config", f"{made}/run/config.yaml", f"output={output}",
                     f"text.encoder={made}/text", "train.precision=fp32", *more, expect=expect)


def test_held_out_samples_score_alike_in_training_and_sampling(made, tmp_path):
    done = evaluate(made, tmp_path / "out", "--held-out", "--packs", "2", "--json")
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "out/evaluation.json").read_text())
    held_out = result["held_out"]
    assert held_out["packs"] >= 1 and 0 < held_out["bit_accuracy"] < 1 and len(held_out["loss_by_noise"]) == 10
    same = held_out["training_and_sampling"]
    assert same["samples"] == held_out["samples"] > 0
    assert same["largest_score_difference"] < 1e-4 * max(1.0, same["score_standard_deviation"])


def test_the_fitted_rule_has_the_mean_that_was_asked_for_and_can_be_sampled_with(made, tmp_path):
    sampling = ("sampling.tmax=12", "sampling.adaptive.wp=2", "sampling.adaptive.tmin=4", "tokenize.latent_side=2",
                "tokenize.max_frames=9")
    done = evaluate(made, tmp_path / "out", "--calibrate-steps", "--prompts", f"{made}/prompts.txt", "--mean-steps",
                    "7", "--spread", "4", *sampling)
    assert "mean 7" in done.stdout or "mean 6.9" in done.stdout or "mean 7.1" in done.stdout, done.stdout
    rule = yaml.safe_load((tmp_path / "out/adaptive.yaml").read_text())["sampling"]["adaptive"]
    assert rule["enabled"] and rule["wp"] == 2 and (tmp_path / "out/steps.png").stat().st_size > 1000
    fitted = [f"sampling.adaptive.{key}={str(value).lower()}" for key, value in rule.items()]
    done = grn_scale("sample", "--run", f"{made}/run", "--prompts", f"{made}/prompts.txt", f"output={tmp_path}/samples",
                     f"text.encoder={made}/text", "train.precision=fp32", *sampling[:1], *sampling[3:], *fitted,
                     "--json")
    steps = [sample["steps"] for sample in json.loads(done.stdout)["samples"]]
    assert len(set(steps)) > 1 and 4 <= min(steps) and max(steps) <= 12


@pytest.mark.parametrize(("more", "message"), [
    ((), "say what to measure"),
    (("--calibrate-steps",), "needs --prompts"),
    (("--calibrate-steps", "--prompts", "/nowhere"), "cannot read /nowhere"),
])
def test_what_is_missing_is_named_and_nothing_is_written(made, tmp_path, more, message):
    done = evaluate(made, tmp_path / "out", *more, expect=1 if "/nowhere" in more else 2)
    assert message in done.stderr and not (tmp_path / "out").exists()

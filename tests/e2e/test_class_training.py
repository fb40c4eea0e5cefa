"""`grn-scale train` with a class-conditional configuration: from labelled clips to images sampled by class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grn_scale.checkpoint import load_weights
from grn_scale.class_to_image import ClassSamplingSettings, generate, load_model
from grn_scale.cli import main
from grn_scale.train.metrics import read_metrics
from tests.helpers.clips import write_clip, write_manifest, write_text_encoder, write_tokenizer
from tests.helpers.jobs import grn_scale

MODEL = ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.bottleneck_size=8",
         "model.in_context_length=2", "model.in_context_start=1", "model.num_classes=3", "model.grid=2",
         "model.latent_channels=4"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_manifest(folder / "clips.jsonl", [{"path": str(write_clip(folder / f"clips/{i}.mp4", i)), "class_id": i % 3}
                                            for i in range(24)])
    write_tokenizer(folder / "tokenizer.safetensors")
    write_text_encoder(folder / "text", 24)
    grn_scale("tokenize", "--config", "configs/runs/class_b.yaml", "model.latent_channels=4", "tokenize.latent_side=2",
              f"data.manifest={folder}/clips.jsonl", f"output={folder}/tokens", "tokenize.shard_samples=8",
              f"tokenizer.path={folder}/tokenizer.safetensors", f"text.encoder={folder}/text")
    return folder


def arguments(dataset: Path, output: Path, *more: str) -> list[str]:
    return ["train", *MODEL, f"data.dataset={dataset}/tokens", f"tokenizer.path={dataset}/tokenizer.safetensors",
            f"output={output}", "data.token_budget=128", "data.packs_per_step=1", "data.validation_fraction=0.2",
            "data.validation_packs=2", "train.steps=8", "train.checkpoint_every=4", "train.validate_every=4",
            "train.precision=fp32", "schedule.warmup_steps=2", "optimizer.lr=2e-3", "optimizer.clip_norm=1.0", *more]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    """A finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    grn_scale(*arguments(dataset, folder))
    return folder


def test_a_class_model_trains_resumes_exactly_and_samples(dataset, trained, tmp_path):
    grn_scale(*arguments(dataset, tmp_path / "b", "train.steps=4"))
    grn_scale(*arguments(dataset, tmp_path / "b", "--resume", "auto"))
    for ema in (False, True):
        weights = load_weights(trained, ema=ema)
        assert all(torch.equal(value, load_weights(tmp_path / "b", ema=ema)[name]) for name, value in weights.items())
    rows = read_metrics(trained / "metrics.jsonl")
    assert rows[0]["validation_loss"] == pytest.approx(torch.tensor(16.0).log().item(), abs=1e-4)
    assert rows[8]["loss"] < rows[1]["loss"] and rows[1]["model_tflops_per_second"] > 0
    images = generate(load_model(trained, ema=True), [0, 1, 2], ClassSamplingSettings(steps=4))
    assert images.labels.shape == (3, 4, 2, 2)
    for form, output in (("official", tmp_path / "a.pth"), ("hf", tmp_path / "hf")):
        assert main(["convert", "--input", str(trained), "--from", "native", "--to", form, "--output",
                     str(output)]) == 0
    again = generate(load_model(tmp_path / "hf"), [0, 1, 2], ClassSamplingSettings(steps=4))
    assert torch.equal(again.labels, images.labels)
    assert main(["convert", "--input", str(trained), "--from", "native", "--to", "native", "--output",
                 str(tmp_path / "native")]) == 0
    grn_scale(*arguments(dataset, tmp_path / "c", f"init.from={tmp_path}/native", "init.weights=ema", "train.steps=1",
                         "schedule.warmup_start=0"))
    assert all(torch.equal(load_weights(tmp_path / "c")[name], value)
               for name, value in load_weights(trained, ema=True).items())
    text = ("model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "model.text_hidden_size=64")
    done = grn_scale("train", *text, f"data.dataset={dataset}/tokens", f"output={tmp_path}/b", "--resume", "must",
                     f"tokenizer.path={dataset}/tokenizer.safetensors", "model.latent_channels=4",
                     "model.task_tags=false", "data.token_budget=128", "data.validation_fraction=0.2", expect=2)
    assert "another kind of model" in done.stderr


def test_the_run_is_sampled_by_class_and_measured_on_held_out_images(trained, tmp_path, capsys):
    assert main(["sample", "--run", str(trained), "--class", "2", "sampling.steps=3", f"output={tmp_path}/out"]) == 0
    assert json.loads((tmp_path / "out/samples.json").read_text())["samples"] == [
        {"file": "0000.png", "draw": 0, "class_id": 2, "steps": 3}]

    capsys.readouterr()
    results = {}
    for weights, flags in (("ema", ()), ("raw", ("--raw",))):
        assert main(["evaluate", "--run", str(trained), "--held-out", "--packs", "2", *flags, "--json",
                     f"output={tmp_path}/{weights}"]) == 0
        results[weights] = json.loads(capsys.readouterr().out)["held_out"]
        assert results[weights]["weights"] == weights and len(results[weights]["loss_by_noise"]) == 10
        same = results[weights]["training_and_sampling"]
        assert same["samples"] == results[weights]["samples"] > 0
        assert same["largest_score_difference"] < 1e-4 * max(1.0, same["score_standard_deviation"])
        assert same["agree"] is True
    validated = read_metrics(trained / "metrics.jsonl")[-1]["validation_loss"]
    assert results["raw"]["loss"] == pytest.approx(validated, rel=1e-5) != pytest.approx(results["ema"]["loss"])


@pytest.mark.parametrize("change,code,message", [
    (("data.validation_fraction=0.5",), 2, "some of these samples were trained on"),
    (("data.dataset=",), 2, "data.dataset is not set"), (("--packs", "0"), 2, "--packs is 0"),
    (("data.dataset={nowhere}",), 1, "dataset.json")])
def test_held_out_images_that_would_say_nothing_are_refused(trained, tmp_path, capsys, change, code, message):
    changed = [part.format(nowhere=tmp_path) for part in change]
    assert main(["evaluate", "--run", str(trained), "--held-out", *changed, f"output={tmp_path}/out"]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_train_like_one(dataset, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        grn_scale(*arguments(dataset, tmp_path / name, "data.token_budget=128", "data.packs_per_step=2",
                             "data.window_shards=1", "train.steps=4"), processes=processes)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
              for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("change,code,message", [
    ("model.num_classes=2", 1, "model.num_classes is 2"), ("parallel.tensor=2", 2, "plain data parallel")])
def test_what_cannot_be_trained_is_refused(dataset, tmp_path, change, code, message):
    assert message in grn_scale(*arguments(dataset, tmp_path / "run", change), expect=code).stderr

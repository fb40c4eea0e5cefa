"""`grn-scale evaluate` on a run that the real commands made."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from grn_scale.cli import main
from grn_scale.data.dataset_info import read_dataset_info
from grn_scale.data.dataset_info import write_dataset as write_dataset_info
from tests.helpers.clips import caption, write_clip
from tests.helpers.evaluation import NETWORK_OPTIONS, write_network
from tests.helpers.jobs import grn_scale, train_arguments, write_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with a dataset and a run of two steps on it."""
    folder = write_dataset(tmp_path_factory.mktemp("evaluate"))
    grn_scale(*train_arguments(folder, folder / "run", "train.steps=2"))
    (folder / "prompts.txt").write_text("".join(f"{caption(n)} {'again ' * n}\n" for n in range(8)))
    return folder


def arguments(made: Path, output: Path, *more: str) -> list[str]:
    return ["evaluate", "--run", f"{made}/run", f"output={output}", f"text.encoder={made}/text", "train.precision=fp32",
            *more]


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-4), ("bf16", 0.1)])
def test_held_out_samples_score_alike_in_training_and_sampling(made, tmp_path, capsys, precision, allowed):
    assert main([*arguments(made, tmp_path / "out", "--held-out", "--packs", "2", "--json"),
                 f"train.precision={precision}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "out/evaluation.json").read_text())
    held_out = result["held_out"]
    assert held_out["packs"] >= 1 and 0 < held_out["bit_accuracy"] < 1 and len(held_out["loss_by_noise"]) == 10
    same = held_out["training_and_sampling"]
    assert same["samples"] == held_out["samples"] > 0
    assert same["largest_score_difference"] < allowed * max(1.0, same["score_standard_deviation"])
    assert same["agree"] is True


def part_of(made: Path, folder: Path, shards: slice) -> Path:
    """A dataset of some of the video shards, with the files of the whole."""
    shutil.copytree(made / "tokens", folder, copy_function=os.link)
    (folder / "dataset.json").unlink()
    info = read_dataset_info(made / "tokens")
    write_dataset_info(folder, replace(info, video_shards=info.video_shards[shards]))
    return folder


def test_each_dataset_of_a_mixture_is_measured_on_its_own_held_out_samples_and_all_together(made, tmp_path, capsys):
    parts = [part_of(made, tmp_path / name, shards) for name, shards in (("a", slice(0, 2)), ("b", slice(2, 3)))]
    mixture = ", ".join(f"{{dataset: {part}, repeats: {n + 1}}}" for n, part in enumerate(parts))

    def measured(name: str, *data: str) -> dict:
        assert main([*arguments(made, tmp_path / name, "--held-out", "--packs", "2", "--json"), *data]) == 0
        return json.loads(capsys.readouterr().out)["held_out"]

    together = measured("all", "data.dataset=", f"data.mixture=[{mixture}]", "data.image_share=0")
    alone = [measured(f"only-{part.name}", f"data.dataset={part}") for part in parts]
    each = together["datasets"]
    assert [part["dataset"] for part in each] == [str(part) for part in parts]
    for part, single in zip(each, alone):
        assert {**single, **part} == {**single, "dataset": part["dataset"]} and "datasets" not in single
    samples = [part["samples"] for part in each]
    assert together["samples"] == sum(samples) > max(samples) and together["training_and_sampling"]["agree"]
    assert together["loss"] == pytest.approx(np.average([part["loss"] for part in each], weights=samples))
    assert main([*arguments(made, tmp_path / "table", "--held-out"), "data.dataset=", f"data.mixture=[{mixture}]"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  of {part}: {count} samples in" in printed for part, count in zip(parts, samples))


def test_the_fitted_rule_has_the_mean_that_was_asked_for_and_can_be_sampled_with(made, tmp_path, capsys):
    sampling = ("sampling.tmax=12", "sampling.adaptive.wp=2", "sampling.adaptive.tmin=4", "tokenize.latent_side=2",
                "tokenize.max_frames=9")
    assert main(arguments(made, tmp_path / "out", "--calibrate-steps", "--prompts", f"{made}/prompts.txt",
                          "--mean-steps", "7", "--spread", "4", *sampling)) == 0
    printed = capsys.readouterr().out
    assert any(f"mean {mean}" in printed for mean in ("6.9", "7.0", "7.1")), printed
    rule = yaml.safe_load((tmp_path / "out/adaptive.yaml").read_text())["sampling"]["adaptive"]
    assert rule["enabled"] and rule["wp"] == 2 and (tmp_path / "out/steps.png").stat().st_size > 1000
    fitted = [f"sampling.adaptive.{key}={str(value).lower()}" for key, value in rule.items()]
    assert main(["sample", "--run", f"{made}/run", "--prompts", f"{made}/prompts.txt", f"output={tmp_path}/samples",
                 f"text.encoder={made}/text", "train.precision=fp32", *sampling[:1], *sampling[3:], *fitted,
                 "--json"]) == 0
    steps = [sample["steps"] for sample in json.loads(capsys.readouterr().out)["samples"]]
    assert len(set(steps)) > 1 and 4 <= min(steps) and max(steps) <= 12


def test_clips_are_reconstructed_round_by_round_without_a_run(made, tmp_path, capsys):
    assert main(["evaluate", "--reconstruct", f"data.manifest={made}/clips.jsonl", "tokenize.fps=16",
                 "tokenize.latent_side=2", "tokenize.max_frames=9", f"tokenizer.path={made}/tokenizer.safetensors",
                 f"output={tmp_path}/out", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["reconstruction"]
    assert (result["clips"], result["undecodable_clips"], result["frames"]) == (24, 0, 24 * 9)
    rows = [json.loads(line) for line in (tmp_path / "out/reconstruction.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 25)) and rows[0]["shape"] == [9, 32, 32]
    for m, entry in enumerate(result["by_rounds"]):
        assert entry["rounds"] == m + 1 and len(rows[0]["psnr_db"]) == result["rounds"] == len(result["by_rounds"])
        assert entry["psnr_db"] == pytest.approx(sum(row["psnr_db"][m] for row in rows) / 24)
        assert entry["ssim"] == pytest.approx(sum(row["ssim"][m] for row in rows) / 24)
    assert (tmp_path / "out/reconstruction.png").stat().st_size > 1000


def test_drawn_samples_and_a_folder_of_them_have_the_same_distance_to_stored_statistics(made, tmp_path, capsys):
    network = [str(write_network(tmp_path / "clips.pt", clips=True)), "--input", "clips", "--clip-frames", "5"]
    compare = ["evaluate", "--features", *network, *NETWORK_OPTIONS, "tokenize.fps=16", "tokenize.latent_side=2",
               "tokenize.max_frames=9", "--json"]
    real = ["--real", f"{made}/clips.jsonl", "--save-statistics", f"{tmp_path}/real.npz"]
    assert main([*compare, *real, f"output={tmp_path}/real"]) == 0
    about = json.loads(capsys.readouterr().out)["features"]["real"]
    assert (about["samples"], about["fps"], about["frame_size"]) == (24, 16, "32x32")
    stored = ["--statistics", f"{tmp_path}/real.npz"]
    assert main([*compare, *stored, "--generate", "--prompts", f"{made}/prompts.txt", "--run", f"{made}/run",
                 f"text.encoder={made}/text", "train.precision=fp32", "sampling.tmax=3", "sampling.steps=3",
                 f"output={tmp_path}/drawn"]) == 0
    told = capsys.readouterr()
    assert "not of the form" not in told.err
    drawn = json.loads(told.out)
    assert drawn["generated"]["samples"] == drawn["features"]["samples"]["samples"] == 8
    assert main([*compare, *stored, "--samples", f"{tmp_path}/drawn/samples", f"output={tmp_path}/again"]) == 0
    again = json.loads(capsys.readouterr().out)["features"]
    assert again["frechet_distance"] == drawn["features"]["frechet_distance"] > 0
    assert again["inception_score"]["mean"] >= 1 and again["reference_samples"] == 24
    assert main([*compare, *stored, "--samples", f"{tmp_path}/drawn/samples", f"output={tmp_path}/other",
                 "--resize", "8x8"]) == 1
    assert "resize None there, [8, 8] here" in capsys.readouterr().err
    # Samples of another form, too few for the splits: both are told, and the distance is there.
    write_clip(tmp_path / "few/a.mp4", 0, height=48, fps=8)
    write_clip(tmp_path / "few/b.mp4", 1, height=48, fps=8)
    assert main([*compare, *stored, "--splits", "3", "--samples", f"{tmp_path}/few", f"output={tmp_path}/few_out"]) == 0
    told = capsys.readouterr()
    few = json.loads(told.out)["features"]
    assert few["inception_score"] is None and few["frechet_distance"] > 0
    message = " ".join(told.err.split())
    assert "2 samples cannot be cut into 3 splits" in message
    assert "8 frames a second against 16; frames of 48x32 pixels against 32x32" in message


@pytest.mark.parametrize(("more", "message"), [
    ((), "say what to measure"),
    (("--calibrate-steps",), "needs --prompts"),
    (("--calibrate-steps", "--prompts", "/nowhere"), "cannot read /nowhere"),
    (("--held-out", "data.validation_fraction=0.5"), "some of these samples were trained on"),
    (("--reconstruct",), "data.manifest is not set"),
    (("--generate",), "needs --prompts"),
    (("--generate", "--prompts", "{prompts}", "--size", "100x32"), "96x32 is near"),
    (("--generate", "--prompts", "{prompts}", "--frames", "8"), "5 would do"),
    (("--features", "n.pt"), "needs samples to judge"),
    (("--features", "n.pt", "--samples", "a", "--generate"), "judge a folder, or samples that are drawn now"),
])
def test_what_is_missing_is_named_and_nothing_is_written(made, tmp_path, capsys, more, message):
    more = [part.format(prompts=made / "prompts.txt") for part in more]
    assert main(arguments(made, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("more", "message"), [
    (("--features", "{here}/missing.pt"), "as TorchScript"),
    (("--features", "{here}/n.pt", "--statistics", "{here}/missing.npz"), "as statistics"),
    (("--features", "{here}/n.pt", "--resize", "none", "--save-statistics", "{here}/n.pt/s.npz"), "cannot make"),
    (("--features", "{here}/n.pt", "--save-statistics", "{here}"), "is a folder"),
])
def test_what_the_samples_are_to_be_judged_by_is_there_before_any_is_drawn(made, tmp_path, capsys, more, message):
    write_network(tmp_path / "n.pt")
    judged = [part.format(here=tmp_path) for part in more]
    assert main(arguments(made, tmp_path / "out", "--generate", "--prompts", f"{made}/prompts.txt", *judged)) == 1
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_the_folder_of_statistics_is_made(made, tmp_path):
    assert main(["evaluate", "--features", str(write_network(tmp_path / "n.pt")), *NETWORK_OPTIONS, "--real",
                 f"{made}/clips.jsonl", "--save-statistics", f"{tmp_path}/a/b/real.npz", "tokenize.latent_side=2",
                 "tokenize.max_frames=9", f"output={tmp_path}/out"]) == 0
    assert (tmp_path / "a/b/real.npz").is_file()

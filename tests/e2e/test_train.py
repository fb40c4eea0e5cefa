"""`grn-scale train` as users run it: from shards to a checkpoint, killed, resumed, refused."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from grn_scale.checkpoint import load_weights
from grn_scale.cli import main
from grn_scale.data.dataset import Dataset
from grn_scale.data.split import held_out
from grn_scale.train.metrics import read_metrics
from tests.helpers.jobs import ENVIRONMENT, command, grn_scale, train_arguments, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    grn_scale(*train_arguments(dataset, output, "data.ledger=true"))
    return output


def write_model(path: Path) -> Path:
    """What shapes do not tell of the tests' model."""
    path.write_text("label_form: bit\nlatent_channels: 4\nrounds: 4\n")
    return path


def same_state(a: Path, b: Path) -> bool:
    return all(torch.equal(value, load_weights(b, ema=ema)[name])
               for ema in (False, True) for name, value in load_weights(a, ema=ema).items())


def test_a_run_leaves_metrics_configuration_and_checkpoints(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    assert rows[0]["validation_loss"] == pytest.approx(0.693, abs=0.01), "two equally likely classes before training"
    assert rows[8]["loss"] < rows[1]["loss"] and rows[8]["validation_loss"] < rows[0]["validation_loss"]
    for key in ("tokens_per_second", "data_wait_seconds", "forward_backward_seconds", "optimizer_seconds"):
        assert rows[1][key] > 0
    assert len(rows[1]["loss_by_noise"]) == len(rows[1]["bit_accuracy_by_noise"]) == 10
    assert "mfu" not in rows[1], "the peak of a CPU is not known"
    assert sorted(p.name for p in undisturbed.glob("step-*")) == ["step-00000004", "step-00000008"]
    state = json.loads((undisturbed / "step-00000008/state.json").read_text())
    assert state["step"] == state["updates"] == 8 and state["samples_seen"] > 0
    assert not any(path.suffix in (".pt", ".pkl", ".pth") for path in undisturbed.rglob("*"))


def ledger_of(dataset: Path, run: Path) -> list[dict]:
    """What `verify --ledger` finds; the run need not be sound."""
    with redirect_stdout(io.StringIO()) as printed:
        main(["verify", str(dataset / "tokens"), "--ledger", str(run / "ledger.jsonl"), "--json"])
    return json.loads(printed.getvalue())["epochs"]


def test_resuming_after_a_kill_equals_the_undisturbed_run_bit_for_bit(dataset, undisturbed, tmp_path) -> None:
    output = tmp_path / "run"
    arguments = train_arguments(dataset, output, "data.ledger=true")
    job = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while not (output / "step-00000004/COMPLETE").exists():
        assert job.poll() is None and time.sleep(0.02) is None
    job.send_signal(signal.SIGKILL)
    job.wait()
    for found in output.glob("step-00000008*"):  # it may have come that far
        found.rename(tmp_path / "later")
    done = grn_scale(*arguments, "--resume", "must")
    said = " ".join(done.stderr.split())
    assert "step 4" in said and "samples seen" in said and "the same now; nothing left out" in said
    assert same_state(undisturbed, output)
    losses = [[row.get("loss") for row in read_metrics(run / "metrics.jsonl")] for run in (undisturbed, output)]
    assert losses[0] == losses[1]
    for run in (undisturbed, output):
        epochs = ledger_of(dataset, run)
        assert len(epochs) > 2 and all(epoch["exact"] and epoch["finished"] for epoch in epochs)


@pytest.mark.parametrize("settings", [("parallel.tensor=2", "train.precision=bf16"),
                                      pytest.param(("parallel.pipeline=2", "train.precision=fp32"),
                                                   marks=pytest.mark.slow)])
def test_two_processes_of_one_model_train_validate_and_resume_the_same(dataset, tmp_path, settings) -> None:
    grn_scale(*train_arguments(dataset, tmp_path / "a", *settings), processes=2)
    grn_scale(*train_arguments(dataset, tmp_path / "b", *settings, "train.steps=4"), processes=2)
    grn_scale(*train_arguments(dataset, tmp_path / "b", *settings, "--resume", "auto"), processes=2)
    assert same_state(tmp_path / "a", tmp_path / "b")


def test_a_ledger_tells_of_a_sample_that_was_not_taken(dataset, undisturbed, tmp_path) -> None:
    for name in ("config.yaml", "ledger.jsonl"):
        shutil.copy(undisturbed / name, tmp_path / name)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_text("".join(lines[1:]))
    first = ledger_of(dataset, tmp_path)[0]
    assert first["finished"] and not first["exact"] and first["missing"] > 0


def test_training_starts_from_converted_weights(dataset, undisturbed, tmp_path) -> None:
    official, native = tmp_path / "model.pth", tmp_path / "native"
    convert = ("convert", "--input", str(undisturbed), "--from", "native", "--to", "official", "--weights", "raw")
    assert main([*convert, "--output", str(official)]) == 0
    assert main(["convert", "--input", str(official), "--from", "official", "--layout", "v2", "--to", "native",
                 "--output", str(native), "--model", str(write_model(tmp_path / "model.yaml"))]) == 0
    assert all(torch.equal(load_weights(native)[name], value) for name, value in load_weights(undisturbed).items())
    done = grn_scale(*train_arguments(dataset, tmp_path / "run", "train.steps=1", f"init.from={native}"))
    assert f"started from the raw weights of {native}/step-00000000 (step 0)" in done.stderr
    rows, before = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / "run", undisturbed))
    assert rows[0]["validation_loss"] == pytest.approx(before[8]["validation_loss"], abs=1e-4)
    done = grn_scale(*train_arguments(dataset, tmp_path / "other", "--resume", str(native)), expect=2)
    assert "holds weights alone" in done.stderr and f"init.from={native}/step-00000000" in done.stderr


def test_a_stage_starts_from_the_average_of_another_run_on_another_layout_and_is_then_resumed(
        dataset, undisturbed, tmp_path) -> None:
    stage = ("train.validate_every=0", f"init.from={undisturbed}", "init.weights=ema", "--resume", "auto")
    still = ("parallel.tensor=2", "train.steps=1", "schedule.warmup_start=0")  # a first step at learning rate 0
    done = grn_scale(*train_arguments(dataset, tmp_path / "run", *stage, *still), processes=2)
    source = f"{undisturbed}/step-00000008"
    assert f"started from the ema weights of {source} (step 8)" in done.stderr
    for name, value in load_weights(undisturbed, ema=True).items():
        assert torch.equal(load_weights(tmp_path / "run")[name], value)
        assert torch.equal(load_weights(tmp_path / "run", ema=True)[name], value)
    done = grn_scale(*train_arguments(dataset, tmp_path / "run", *stage, "train.steps=2"))
    assert f"init.from={undisturbed} is not looked at" in done.stderr and "started from" not in done.stderr
    states = [json.loads((tmp_path / f"run/step-0000000{step}/state.json").read_text()) for step in (1, 2)]
    assert [state["updates"] for state in states] == [1, 2]
    assert all(state["origin"] == {"path": source, "step": 8, "weights": "ema", "origin": None} for state in states)


def test_another_model_is_refused_or_takes_what_fits_and_names_the_rest(dataset, undisturbed, tmp_path) -> None:
    other = ("model.num_layers=2", "model.layout=v1", f"init.from={undisturbed}")
    arguments = train_arguments(dataset, tmp_path / "run", *other, "train.steps=1", "schedule.warmup_start=0",
                                "train.validate_every=0")
    done = grn_scale(*arguments, expect=2)
    assert "model.num_layers 4 -> 2" in done.stderr and "model.layout 'v2' -> 'v1'" in done.stderr
    assert not (tmp_path / "run").exists()
    done = grn_scale(*arguments, "init.partial=true")
    there, here = load_weights(undisturbed), load_weights(tmp_path / "run")
    alike = {name for name in here if name in there and there[name].shape == here[name].shape}
    assert alike and all(torch.equal(here[name], there[name]) for name in alike)
    named = re.findall(r"not taken from step-00000008: (\S+) ", done.stderr)
    assert sorted(named) == sorted((here.keys() | there.keys()) - alike) != []
    assert f"{len(alike)} tensors taken, {len(named)} not" in done.stderr and "model.layout 'v2' -> 'v1'" in done.stderr


def test_a_corrupt_sample_is_recorded_once_and_more_than_the_limit_end_the_run_for_good(dataset, tmp_path) -> None:
    damaged = Path(shutil.copytree(dataset, tmp_path / "damaged"))
    shard = Dataset.open(damaged / "tokens")
    row = next(row for row in shard.rows(0) if not held_out(row.key, 0.2))
    with (damaged / "tokens/video-000000.tar").open("rb+") as file:
        file.seek(row.offset)
        byte = file.read(1)[0]
        file.seek(row.offset)
        file.write(bytes([byte ^ 1]))
    grn_scale(*train_arguments(damaged, tmp_path / "run"), processes=2)
    (line,) = (json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines())
    assert line["key"] == row.key and line["shard"] == "video-000000.tar"
    seen = [step for step in read_metrics(tmp_path / "run/metrics.jsonl") if step.get("bad_samples")]
    assert seen and seen[0]["step"] == line["step"]
    strict = train_arguments(damaged, tmp_path / "strict", "data.bad_sample_limit=0")
    done = grn_scale(*strict, expect=78)
    assert "1 samples are corrupt or unreadable" in done.stderr
    trained = (tmp_path / "strict/metrics.jsonl").read_text()
    done = grn_scale(*strict, "--resume", "auto", expect=78)
    assert "1 samples are corrupt or unreadable" in done.stderr and "before this start" in done.stderr
    assert (tmp_path / "strict/metrics.jsonl").read_text() == trained


@pytest.mark.parametrize("more,code,message", [
    (("parallel.tensor=3",), 2, "parallel.tensor is 3"),
    (("parallel.pipeline=2",), 2, "start 2 processes"),
    (("train.stepz=3",), 2, "did you mean train.steps"),
    (("data.token_budget=100",), 2, "multiple of 128"),
    (("model.rounds=3",), 2, "model.rounds is 3"),
    (("data.dataset=/nowhere",), 1, "dataset.json"),
    (("output=/dev/null/run",), 1, "output: /dev/null is a file"),
    (("tokenizer.path=small",), 1, "was made by the tokenizer"),
])
def test_what_cannot_run_is_refused_with_one_message_and_no_run_folder(
        dataset, tmp_path, capsys, more, code, message) -> None:
    assert main(train_arguments(dataset, tmp_path / "run", *more)) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resume_must_have_something_to_resume(dataset, tmp_path) -> None:
    done = grn_scale(*train_arguments(dataset, tmp_path / "run", "--resume", "must"), expect=1)
    assert "no checkpoint" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_refused_start_leaves_no_run_folder_and_a_refused_resume_leaves_the_run_as_it_was(
        dataset, undisturbed, tmp_path) -> None:
    done = grn_scale(*train_arguments(dataset, tmp_path / "run", "data.packs_per_step=1000"), expect=2)
    assert "too small for a step" in done.stderr and not (tmp_path / "run").exists()
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    done = grn_scale(*train_arguments(dataset, undisturbed, "model.layout=v1", "--resume", "auto"), expect=2)
    assert re.search("another model .*layout", " ".join(done.stderr.split())) and "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}


def test_a_used_run_folder_is_refused_without_resume(dataset, undisturbed) -> None:
    done = grn_scale(*train_arguments(dataset, undisturbed), expect=2)
    assert "--resume auto" in done.stderr

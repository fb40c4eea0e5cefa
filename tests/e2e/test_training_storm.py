"""Training under fire: processes killed while they train and save, disks that fill up, files cut short.

Each time the next start must find a complete checkpoint, lose no step behind it, and end with the losses and weights of
an undisturbed run, bit for bit. The full storm, with its record:

    GRN_STORM_RECORD=storm.json python -m pytest -m slow tests/e2e/test_training_storm.py
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from grn_scale.checkpoint import load_weights
from grn_scale.checkpoint.layout import newest_complete, scan
from grn_scale.train.metrics import read_metrics
from tests.helpers.jobs import ENVIRONMENT, command, train_arguments, write_dataset

STEPS, SAVE_EVERY = 60, 4
PROCESSES = 2
SETTINGS = [f"train.steps={STEPS}", f"train.checkpoint_every={SAVE_EVERY}", "train.keep_last=2",
            "train.validate_every=0", "optimizer.ema_decay=0.9", "schedule.warmup_steps=2", "train.threads=1"]
BLOWS = ("one", "all", "writer", "full disk", "cut file")
"""SIGKILL of one process, of all, of one while a save is being written; a file size limit, under which every save
fails, and then all are killed; SIGKILL of all and a file of the newest checkpoint cut short."""
FILE_LIMIT = 20_000
"""Bytes a file may have on a full disk: metrics fit, tensors do not."""
PATIENCE_SECONDS = 400


@dataclass
class Storm:
    blows: int
    seed: int
    counts: Counter = field(default_factory=Counter)
    starts: int = 0
    runs: int = 0
    steps_repeated: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = start(dataset, output)
    assert job.wait(PATIENCE_SECONDS) == 0
    return output


def start(dataset: Path, output: Path, full_disk: bool = False) -> subprocess.Popen:
    """The job in a process group of its own."""
    log = (output.parent / f"{output.name}.log").open("ab")

    def prepare() -> None:
        if full_disk:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails with EFBIG, as on a full disk with ENOSPC
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))

    return subprocess.Popen(
        command(*train_arguments(dataset, output, *SETTINGS), "--resume", "auto", processes=PROCESSES),
        env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True, preexec_fn=prepare)


def workers(job: subprocess.Popen) -> list[int]:
    """The training processes of the job: children of its launcher."""
    with contextlib.suppress(FileNotFoundError):
        return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]
    return []


def kill(job: subprocess.Popen) -> None:
    """All processes of the job."""
    for pid in workers(job):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait(PATIENCE_SECONDS)


def steps_written(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_bytes().count(b'"gradient_norm"') if path.is_file() else 0


def wait(job: subprocess.Popen, reached) -> bool:
    """Until `reached()` or the job ends; whether it still runs."""
    end = time.monotonic() + PATIENCE_SECONDS
    while job.poll() is None and not reached():
        assert time.monotonic() < end, "the job hangs"
        time.sleep(0.005)
    return job.poll() is None


def strike(blow: str, job: subprocess.Popen, output: Path, storm: Storm) -> bool:
    """Let the job train a while, then strike; False where it was done before."""
    wanted = steps_written(output) + storm.random.randint(1, 2 * SAVE_EVERY)
    if not wait(job, lambda: steps_written(output) >= wanted):
        return False
    if blow == "writer" and not wait(job, lambda: any(output.glob("step-*.partial"))):
        return False
    time.sleep(storm.random.random() * (0.05 if blow == "writer" else 0.3))
    if blow in ("one", "writer"):
        alive = workers(job)
        if not alive:
            return False
        os.kill(storm.random.choice(alive), signal.SIGKILL)
        assert job.wait(PATIENCE_SECONDS) != 0, "the launcher must notice a dead process"
    kill(job)
    if blow == "cut file":
        complete = [found for found in scan(output) if not found.problem]
        if len(complete) > 1:  # with only one there would be nothing left to go back to
            files = sorted(path for path in complete[-1].path.rglob("*.safetensors"))
            file = storm.random.choice(files)
            os.truncate(file, storm.random.randrange(file.stat().st_size))
    return True


def weather(dataset: Path, undisturbed: Path, folder: Path, storm: Storm) -> None:
    """Runs, struck again and again, until there were as many blows as asked for and the last run is complete."""
    expected = {row["step"]: row["loss"] for row in read_metrics(undisturbed / "metrics.jsonl")}
    output = folder / "run-0"
    while True:
        blow = storm.random.choice(BLOWS) if sum(storm.counts.values()) < storm.blows else None
        before = newest_complete(output) if output.is_dir() else None
        job = start(dataset, output, full_disk=blow == "full disk")
        storm.starts += 1
        if blow and strike(blow, job, output, storm):
            storm.counts[blow] += 1
            rows = read_metrics(output / "metrics.jsonl")
            assert {row["step"]: row["loss"] for row in rows}.items() <= expected.items()
            if before:  # what was complete when the start looked is where it went on: no step behind it is lost
                first = int(before.name.removeprefix("step-"))
                storm.steps_repeated += max(0, first - (max((row["step"] for row in rows), default=first)))
            continue
        code = job.wait(PATIENCE_SECONDS)
        if code and blow == "full disk":  # it came to its end, where a save that fails is an error
            storm.counts[blow] += 1
            continue
        assert code == 0, (folder / f"{output.name}.log").read_text()[-3000:]
        check(output, undisturbed, expected)
        storm.runs += 1
        if sum(storm.counts.values()) >= storm.blows:
            return
        output = folder / f"run-{storm.runs}"


def check(output: Path, undisturbed: Path, expected: dict[int, float]) -> None:
    rows = read_metrics(output / "metrics.jsonl")
    assert {row["step"]: row["loss"] for row in rows} == expected
    for ema in (False, True):
        want = load_weights(undisturbed, ema=ema)
        assert all(torch.equal(tensor, want[name]) for name, tensor in load_weights(output, ema=ema).items())


@pytest.mark.parametrize("blows", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_runs_end_as_if_nothing_had_happened(dataset, undisturbed, tmp_path, blows: int) -> None:
    storm, began = Storm(blows, seed=blows), time.monotonic()
    weather(dataset, undisturbed, tmp_path, storm)
    if record := os.environ.get("GRN_STORM_RECORD"):
        Path(record).write_text(json.dumps({
            "blows": dict(storm.counts), "starts": storm.starts, "complete_runs": storm.runs, "processes": PROCESSES,
            "steps_of_a_run": STEPS, "minutes": round((time.monotonic() - began) / 60, 1)}, indent=1) + "\n")

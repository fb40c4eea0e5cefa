"""Runs that look after themselves, as processes: stopped and started again, gone back after a spike, hung, broken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grn_scale.checkpoint.layout import newest_complete
from tests.helpers.jobs import ENVIRONMENT, command
from tests.helpers.rank_pool import free_port
from tests.helpers.self_care import arguments, steps_done, write_dataset

LIMIT_SECONDS = 200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens")


def helper(name: str, *more: str) -> list[str]:
    return [sys.executable, "-m", f"tests.helpers.{name}", *more]


@pytest.fixture(scope="module")
def stopped(dataset, tmp_path_factory) -> tuple[Path, dict]:
    """Folder of runs, and what `stopped_runs` found; its run a was stopped by SIGTERM in a process of its own."""
    folder = tmp_path_factory.mktemp("runs")
    job = subprocess.Popen(command(*arguments(dataset, folder / "a")), env=ENVIRONMENT, stderr=subprocess.PIPE,
                           text=True)
    while steps_done(folder / "a") < 3:
        assert job.poll() is None and time.sleep(0.01) is None
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGTERM)
    _, log = job.communicate(timeout=LIMIT_SECONDS)
    assert job.returncode == 75, log
    assert "got SIGTERM or SIGUSR2" in " ".join(log.split())
    done = subprocess.run(helper("stopped_runs", str(dataset), str(folder)), env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_signals_and_deadlines_end_a_run_in_a_checkpoint_with_75(stopped) -> None:
    _, found = stopped
    assert found["codes"] == [75, 75, 0, 0, 0] and found["closed_engines"] == 1
    assert found["stopped_at"][-1] == found["stopped_at"][-2] + 1, "a deadline that is near ends it with its first step"


def test_a_run_stopped_three_times_equals_the_undisturbed_one_bit_for_bit(stopped) -> None:
    _, found = stopped
    assert [row["step"] for row in found["rows"]["a"]] == list(range(1, 25))
    assert found["rows"]["a"] == found["rows"]["undisturbed"]


def test_a_spike_takes_the_run_back_and_reads_no_sample_twice(stopped) -> None:
    folder, found = stopped
    lines = [json.loads(line) for line in (folder / "spiked/metrics.jsonl").read_text().splitlines()]
    (rollback,) = [line for line in lines if line.get("event") == "rollback"]
    assert (rollback["step"], rollback["from_step"]) == (12, 19), "the checkpoint of step 16 holds what wrecked it"
    assert (folder / "spiked/step-00000016.doubtful/COMPLETE").is_file()
    assert (folder / "spiked/step-00000016/COMPLETE").is_file(), "saved again by the steps that replaced it"
    assert rollback["loss_at_spike"] > 1.0
    rows = found["rows"]["spiked"]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert all(row["loss"] < 0.75 for row in rows[:22]), "what the spike left behind is gone"
    assert rows[:12] == found["rows"]["undisturbed"][:12]
    state = json.loads((folder / "spiked/step-00000024.doubtful/state.json").read_text())
    assert (state["step"], state["updates"], state["batches"]) == (24, 24, 31)
    assert rows[23]["loss"] > 1.0 and newest_complete(folder / "spiked").name == "step-00000020", "it ends in doubt"
    for epochs in found["ledgers"].values():
        finished = [epoch for epoch in epochs if epoch["finished"]]
        assert finished and all(epoch["exact"] for epoch in finished)


def test_the_health_file_tells_that_a_run_has_ended(stopped) -> None:
    folder, _ = stopped
    health = json.loads((folder / "undisturbed/health.json").read_text())
    assert (health["state"], health["step"], health["phases"], health["silent"]) == ("ended", 24, {"end": 1}, [])


def start_broken(dataset: Path, run: Path, launcher: list[str], kind: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, "-m", "tests.helpers.broken_rank", kind, *arguments(dataset, run), "watchdog.step_seconds=10",
         "train.checkpoint_every=3"],
        env={**ENVIRONMENT, **environment}, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def broken(dataset, tmp_path_factory) -> tuple[Path, dict[str, list[tuple[int, str, float]]]]:
    """Folder of two runs at a time, and how their launcher (hang) or their ranks (raise) ended."""
    folder, port = tmp_path_factory.mktemp("broken"), str(free_port())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    jobs = {"hang": [start_broken(dataset, folder / "hang", torchrun, "hang")],
            "raise": [start_broken(dataset, folder / "raise", [sys.executable], "raise", RANK=str(rank),
                                   LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                                   MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]}
    return folder, {kind: [end_of(process) for process in jobs[kind]] for kind in ("raise", "hang")}


def end_of(process: subprocess.Popen) -> tuple[int, str, float]:
    """Exit code, log, and when it ended."""
    _, log = process.communicate(timeout=LIMIT_SECONDS)
    return process.returncode, log, time.monotonic()


def test_a_rank_that_hangs_is_named_and_all_leave_their_stacks(broken) -> None:
    folder, ends = broken
    ((code, log, _),) = ends["hang"]
    assert code != 0 and "exitcode  : 79" in log, log
    (hang,) = (folder / "hang/hangs").iterdir()
    for text in (log, (hang / "report.txt").read_text()):
        assert "behind is rank 1" in text and "step 4, data" in text and "broken_rank.py" in text
        assert "the others wait: 1 in step of step 4" in text
    stacks = {path.name: path.read_text() for path in hang.glob("rank-*")}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    assert "in hang" in stacks["rank-00001.txt"] and "all_reduce" in stacks["rank-00000.txt"]
    assert stacks["rank-00000.txt"].split("samples: ")[1].startswith("clip")


def test_a_rank_that_fails_takes_the_others_down_with_its_error(broken) -> None:
    folder, ends = broken
    (code, log, ended), (failed_code, failed_log, failed_ended) = ends["raise"]
    assert (code, failed_code) == (1, 1), (log, failed_log)
    assert failed_ended - ended > 4, "the other does not wait for the save that is still in flight there"
    assert "on fire; leaving once the checkpoint in flight is written" in " ".join(failed_log.split())
    assert "error: rank 1 on" in log and "failed: ValueError: the shard cabinet is on fire" in log
    assert "Traceback" not in log, "the broken collective says nothing"
    assert "Traceback" in failed_log and "the shard cabinet is on fire" in failed_log
    assert json.loads((folder / "raise/health.json").read_text())["state"] == "failed"

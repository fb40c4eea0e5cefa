"""Jobs from submission to their last requeue, on a real Slurm of two nodes and a spare one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grn_scale.config.load import read_mapping
from grn_scale.slurm.records import newest
from grn_scale.slurm.starts import read_starts
from grn_scale.train.metrics import read_metrics
from tests.helpers.jobs import MODEL, grn_scale, train_arguments, write_dataset
from tests.helpers.slurm_cluster import SlurmCluster
from tests.helpers.tokenize_setup import content

SITE = """\
partition: main
time_limit: "10"
gpus_per_node: 2
signal_seconds: 60
"""
LAYOUT = ["parallel.tensor=2", "parallel.pipeline=2", "zero.stage=1"]
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("slurm"))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(SITE)
    return path


class Slurm:
    """`grn-scale slurm ...` on the test cluster."""

    def __init__(self, cluster: SlurmCluster, site: Path) -> None:
        self.cluster, self.site = cluster, site

    def __call__(self, kind: str, *arguments: str | Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        options = ["--cluster", str(self.site)] if kind in ("train", "tokenize", "convert", "evaluate") else []
        return self.cluster.run(sys.executable, "-m", "grn_scale", "slurm", kind, *options, *map(str, arguments),
                                expect=expect, timeout=PATIENCE_SECONDS)


@pytest.fixture
def slurm(cluster: SlurmCluster, site: Path) -> Slurm:
    return Slurm(cluster, site)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def ends(run: Path) -> list[tuple[int, str]]:
    """Exit code and decision of each start that came to its end."""
    return [(start.code, start.decision) for start in read_starts(newest(run).folder) if start.ended is not None]


def logs(run: Path) -> str:
    """What a failing test shows of a job."""
    records = newest(run).folder
    paths = sorted(records.rglob("*.out")) + sorted(records.rglob("rank-*.log"))
    return "\n".join(f"== {path}\n{path.read_text()[-3000:]}" for path in paths)


def until(reached: Callable[[], bool], what: str, run: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < end, f"not {what}\n{logs(run)}"
        time.sleep(0.2)


def test_a_job_on_two_nodes_ends_as_if_nothing_had_happened_to_it(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    quiet, shaken = tmp_path / "quiet", tmp_path / "sha ken $HOME"
    steps = ["train.steps=30", "train.checkpoint_every=2", "train.validate_every=15", *LAYOUT]
    slurm("train", *train_arguments(dataset, quiet, *steps)[1:], "--nodes", 2, "--submit", "--wait")
    assert ends(quiet) == [(0, "done")] and len(losses(quiet)) == 30

    cluster = slurm.cluster
    job = slurm("train", *train_arguments(dataset, shaken, *steps)[1:], "--nodes", 2, "--submit").stdout.strip()

    def steps_done() -> int:
        path = shaken / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    for starts, hit in enumerate((lambda: cluster.run("scontrol", "requeue", job),
                                  lambda: cluster.run("scancel", "--signal=USR2", "--batch", job),
                                  lambda: cluster.kill_node_tasks(job, "node2")), 1):
        before = steps_done()
        until(lambda: steps_done() > before + 2, "at work", shaken)
        hit()
        until(lambda: len(read_starts(newest(shaken).folder)) > starts, "started again", shaken)
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "COMPLETED", logs(shaken)
    assert losses(shaken) == losses(quiet)
    assert ends(shaken)[-3:] == [(75, "requeue"), (137, "requeue"), (0, "done")]


def test_a_job_that_would_fail_again_is_not_started_again(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned"
    refused = slurm("train", *train_arguments(dataset, poisoned, "parallel.tensor=3")[1:], "--submit", expect=2)
    assert "parallel.tensor" in refused.stderr and not poisoned.exists()

    # legal when it is submitted, refused when it starts
    cluster, late = slurm.cluster, tmp_path / "late"
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    job = slurm("train", *train_arguments(dataset, late)[1:], "--gpus-per-node", 1, "--submit").stdout.strip()
    config = late / "slurm/0001/config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 32", "hidden_size: 33"))
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "FAILED"
    assert ends(late) == [(2, "stop")]
    assert "model.hidden_size" in slurm("why", late, expect=None).stdout


ENDS = """\
import os, pathlib, signal, sys, time
if "grn_scale.slurm.task" in sys.orig_argv:
    here = pathlib.Path(__file__).parent
    code, asked = (here / os.environ.get("SLURM_RESTART_COUNT", "0")).read_text().split()
    if asked != "once":
        signal.signal(signal.SIGUSR2, signal.SIG_IGN if asked == "stuck" else lambda *_: os._exit(int(code)))
        signal.signal(signal.SIGTERM, signal.SIG_IGN if asked == "stuck" else signal.SIG_DFL)
        (here / "ready").touch()
        while True:
            time.sleep(600)
    os._exit(int(code))
"""
"""Ends the processes of each start with the exit code of a file, at once, when asked to, or not at all."""


def ending(folder: Path, *starts: str) -> str:
    """Line of a cluster file with which the starts of a job end so."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ENDS)
    for number, how in enumerate(starts):
        (folder / str(number)).write_text(how)
    return f"environment:\n  PYTHONPATH: {folder}\n"


def test_a_job_that_crashes_is_stopped_after_a_few_starts(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    cluster, run, broken = slurm.cluster, tmp_path / "run", tmp_path / "broken"
    slurm.site.write_text(SITE + ending(broken, "75 asked", "1 asked", "1 once"))
    job = slurm("train", *train_arguments(dataset, run)[1:], "--gpus-per-node", 1, "--start-limit", 2,
                "--no-preflight", "--submit").stdout.strip()
    for number in (1, 2):  # one that saves when it is asked weighs little, one that fails then counts in full
        until((broken / "ready").exists, f"at work for the {number}. time", run)
        (broken / "ready").unlink()
        cluster.run("scancel", "--signal=USR2", "--batch", job)
        until(lambda: len(ends(run)) == number, f"ended for the {number}. time", run)
    until(lambda: len(ends(run)) == 4, "stopped", run)
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "FAILED"
    assert ends(run) == [(75, "requeue"), (1, "requeue"), (1, "requeue"), (78, "stop")]
    assert "2 starts in a row" in slurm("status", run).stdout
    assert not (newest(run).folder / "preflight").exists()


def test_a_node_that_fails_is_neither_success_nor_cancelled(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    cluster, run, broken = slurm.cluster, tmp_path / "run", tmp_path / "broken"
    slurm.site.write_text(f"{SITE}requeue: false\n{ending(broken, '75 asked')}")
    slurm("train", *train_arguments(dataset, run)[1:], "--gpus-per-node", 1, "--no-preflight", "--sbatch",
          "nodelist=node1", "--submit")
    until((broken / "ready").exists, "at work", run)
    try:
        cluster.run("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
        until(lambda: bool(ends(run)), "ended", run)
    finally:
        cluster.run("scontrol", "update", "NodeName=node1", "State=RESUME", expect=None)  # it may be back by itself
    assert ends(run) == [(1, "left")], logs(run)  # srun said 0
    assert "the node node1 failed" in slurm("why", run, expect=None).stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["asked", "stuck"])
def test_a_job_that_gets_nowhere_in_all_its_time_is_stopped(slurm: Slurm, dataset: Path, tmp_path: Path,
                                                            how: str) -> None:
    cluster, run = slurm.cluster, tmp_path / "run"
    slurm.site.write_text(SITE.replace("signal_seconds: 60", "signal_seconds: 30")
                          + ending(tmp_path / "broken", f"75 {how}"))
    job = slurm("train", *train_arguments(dataset, run)[1:], "--gpus-per-node", 1, "--start-limit", 1, "--time", 2,
                "--no-preflight", "--submit").stdout.strip()
    until(lambda: len(ends(run)) == 2, "asked by Slurm and stopped", run)
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "FAILED"
    assert ends(run) == [(75, "requeue"), (78, "stop")]


def break_node(slurm: Slurm, folder: Path, node: str) -> None:
    """The preflight of a node fails from now on; jobs may go to the spare one."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"import os\nif os.environ.get('SLURMD_NODENAME') == '{node}':\n"
                                             "    os.environ['TMPDIR'] = '/lost'\n")
    slurm.site.write_text(SITE.replace("main", "wide") + f"environment:\n  PYTHONPATH: {folder}\n")


@pytest.mark.slow
@pytest.mark.parametrize("chain", [1, 2])
def test_a_job_of_one_node_leaves_it_out_where_it_is_bad(slurm: Slurm, dataset: Path, tmp_path: Path,
                                                         chain: int) -> None:
    run = tmp_path / "run"
    break_node(slurm, tmp_path / "broken", "node1")
    if chain > 1:
        slurm.site.write_text(f"{slurm.site.read_text()}requeue: false\n")
    *_, job = slurm("train", *train_arguments(dataset, run)[1:], "--gpus-per-node", 1, "--exclude-failed-nodes",
                    "--chain", chain, "--submit").stdout.split()
    assert slurm.cluster.wait(job, timeout=PATIENCE_SECONDS) == "COMPLETED", logs(run)
    assert [start.nodes for start in read_starts(newest(run).folder)] == ["node1", "node2"]


@pytest.mark.slow
def test_a_job_leaves_a_bad_node_out_and_comes_back_when_it_is_preempted(slurm: Slurm, dataset: Path,
                                                                         tmp_path: Path) -> None:
    run, cluster = tmp_path / "run", slurm.cluster
    break_node(slurm, tmp_path / "broken", "node2")
    job = slurm("train", *train_arguments(dataset, run, "train.steps=30", "train.checkpoint_every=10", *LAYOUT)[1:],
                "--nodes", 2, "--exclude-failed-nodes", "--torchrun", "--submit").stdout.strip()
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, "at work", run)
    starts = read_starts(newest(run).folder)
    assert [start.nodes for start in starts] == ["node[1-2]", "node[1,3]"] and ends(run) == [(1, "requeue")]
    assert "node[1,3]" in slurm("status", run).stdout
    urgent = cluster.submit("sleep 5", "--partition=urgent", "--nodelist=node1", "--exclusive", "--output=/dev/null")
    assert cluster.wait(urgent, timeout=PATIENCE_SECONDS) == "COMPLETED"
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "COMPLETED", logs(run)
    assert ends(run) == [(1, "requeue"), (75, "requeue"), (0, "done")] and len(losses(run)) == 30
    assert "node2" not in "".join(start.nodes for start in read_starts(newest(run).folder)[1:])


@pytest.mark.slow
def test_a_conversion_that_is_killed_is_done_by_the_next_start(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    cluster, broken, weights = slurm.cluster, tmp_path / "broken", tmp_path / "weights"
    grn_scale("train", *train_arguments(dataset, tmp_path / "run", "train.steps=1")[1:])
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('SLURM_RESTART_COUNT', '0') == '0':\n"
        f"    os.rename = lambda source, target: (target == {str(weights)!r} or str(target) == {str(weights)!r}) "
        "and os.kill(os.getpid(), 9)\n")
    slurm.site.write_text(SITE + f"environment:\n  PYTHONPATH: {broken}\n")
    job = slurm("convert", "--input", tmp_path / "run", "--from", "native", "--to", "hf", "--output", weights,
                "--submit").stdout.strip()
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "COMPLETED", logs(weights)
    starts = [(start.code, start.decision) for start in read_starts(newest(weights).folder)]
    assert starts == [(137, "requeue"), (0, "done")] and list(weights.glob("*.safetensors"))
    assert not list(tmp_path.glob("*.partial"))


def test_an_array_makes_the_same_dataset_though_tasks_are_killed(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    cluster, tokens = slurm.cluster, tmp_path / "tokens"
    source = read_mapping(dataset / "tokens/config.yaml", "config")
    arguments = [f"data.manifest={source['data']['manifest']}", f"text.encoder={source['text']['encoder']}",
                 f"tokenizer.path={source['tokenizer']['path']}", "tokenize.fps=16", "tokenize.latent_side=2",
                 "tokenize.max_frames=9", "tokenize.shard_samples=2", "tokenize.lease_seconds=5", *MODEL]
    alone = tmp_path / "alone"
    grn_scale("tokenize", *arguments, f"output={alone}")
    job = slurm("tokenize", *arguments, f"output={tokens}", "--array", 8, "--submit").stdout.strip()
    killed: set[str] = set()

    def three_are_killed() -> bool:
        for task in range(8):
            element = f"{job}_{task}"
            if len(killed) < 3 and element not in killed and cluster.state(element) == "RUNNING" and any(
                    cluster.kill_node_tasks(element, node) for node in ("node1", "node2")):
                killed.add(element)
        return len(killed) == 3

    until(three_are_killed, "three tasks killed", tokens)
    until(lambda: len(ends(tokens)) == 8 + len(killed), "all done", tokens)
    assert cluster.wait(job, timeout=PATIENCE_SECONDS) == "COMPLETED", logs(tokens)
    assert sum(code == 137 for code, _ in ends(tokens)) == 3
    assert content(tokens) == content(alone)


def test_a_chain_goes_on_where_a_job_ended_and_ends_with_the_work(slurm: Slurm, dataset: Path, tmp_path: Path) -> None:
    slurm.site.write_text(SITE + "requeue: false\n")
    cluster, run = slurm.cluster, tmp_path / "run"
    jobs = slurm("train", *train_arguments(dataset, run, "train.steps=60", "train.checkpoint_every=2")[1:],
                 "--gpus-per-node", 1, "--chain", 3, "--submit").stdout.split()
    until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, "at work", run)
    cluster.run("scancel", "--signal=USR2", "--batch", jobs[0])
    assert cluster.wait(jobs[0], timeout=PATIENCE_SECONDS) == "FAILED"  # with 75
    assert cluster.wait(jobs[1], timeout=PATIENCE_SECONDS) == "COMPLETED", logs(run)
    assert cluster.wait(jobs[2], timeout=PATIENCE_SECONDS) == "CANCELLED"
    assert ends(run) == [(75, "next"), (0, "done")] and len(losses(run)) == 60

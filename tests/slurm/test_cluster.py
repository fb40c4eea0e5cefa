"""What the job script relies on, on a real Slurm: ranks, signals, requeueing, arrays. And the tests' own cluster."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers import slurm_cluster
from tests.helpers.slurm_cluster import SlurmCluster

TASK = "trap 'echo USR2 $SLURM_PROCID' USR2; echo up $SLURM_PROCID; for i in {1..300}; do sleep 0.1; done"
"""A rank that says when it has begun and each USR2, for half a minute."""

KILLED = """
import os, signal
from tests.helpers.slurm_cluster import SlurmCluster

with SlurmCluster() as cluster:
    cluster.wait(cluster.submit("sleep 300", "--output=/dev/null"), "RUNNING")
    print(cluster.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""A program that is killed while a job runs on the cluster it started."""


def wait_for(path: Path, *texts: str, timeout: float = 20) -> str:
    """The text of a job's output as soon as it holds all of `texts`."""
    end = time.monotonic() + timeout
    while not all(text in (said := path.read_text() if path.exists() else "") for text in texts):
        assert time.monotonic() < end, said
        time.sleep(0.05)
    return said


def processes_of(folder: str) -> list[str]:
    """Processes whose command or environment names the folder of a cluster."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if folder.encode() in told:
            found.append(process.name)
    return found


def test_a_job_has_its_ranks_and_gpus_on_both_nodes(cluster, tmp_path):
    job = cluster.submit("srun --label bash -c 'echo $SLURMD_NODENAME $SLURM_LOCALID gpus $CUDA_VISIBLE_DEVICES'",
                         "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2", f"--output={tmp_path}/out")
    assert cluster.wait(job) == "COMPLETED"
    assert sorted((tmp_path / "out").read_text().splitlines()) == [
        "0: node1 0 gpus 0,1", "1: node1 1 gpus 0,1", "2: node2 0 gpus 0,1", "3: node2 1 gpus 0,1"]


def test_jobs_share_a_node_and_get_different_gpus(cluster, tmp_path):
    jobs = [cluster.submit("echo $CUDA_VISIBLE_DEVICES; sleep 1", "--nodelist=node1", "--gres=gpu:1",
                           f"--output={tmp_path}/{i}") for i in range(2)]
    assert [cluster.wait(job) for job in jobs] == ["COMPLETED"] * 2
    assert {(tmp_path / f"{i}").read_text() for i in range(2)} == {"0\n", "1\n"}


def test_usr2_for_the_batch_shell_reaches_its_trap_and_srun_passes_it_on_to_all_ranks(cluster, tmp_path):
    job = cluster.submit(f"""
        trap 'echo trapped; kill -USR2 $srun' USR2
        srun bash -c {shlex.quote(TASK)} & srun=$!
        while kill -0 $srun 2>/dev/null; do wait $srun; done""",
        "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/out")
    wait_for(tmp_path / "out", "up 0", "up 1")
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    said = wait_for(tmp_path / "out", "trapped", "USR2 0", "USR2 1")
    assert (said.count("trapped"), said.count("USR2")) == (1, 2)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"


def test_a_job_requeues_itself_and_knows_that_it_was_restarted(cluster, tmp_path):
    job = cluster.submit("""
        echo restart ${SLURM_RESTART_COUNT:-0}
        [ -n "$SLURM_RESTART_COUNT" ] || { scontrol requeue $SLURM_JOB_ID; exit 75; }""",
        "--open-mode=append", f"--output={tmp_path}/out")
    wait_for(tmp_path / "out", "restart 0")
    cluster.wait(job, "PENDING")
    assert cluster.wait(job) == "COMPLETED"
    wait_for(tmp_path / "out", "restart 0", "restart 1")


def test_killed_ranks_of_a_node_leave_the_batch_shell_to_see_it(cluster, tmp_path):
    job = cluster.submit(f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(TASK)}; echo ended $?",
                         "--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/out")
    wait_for(tmp_path / "out", *(f"up {rank}" for rank in range(4)))
    assert cluster.kill_node_tasks(job, "node1") >= 2
    assert cluster.wait(job) == "COMPLETED"
    assert {"ended 137", "ended 143"} & set((tmp_path / "out").read_text().splitlines())  # the highest of all ranks


def test_each_element_of_an_array_is_a_job_of_its_own(cluster, tmp_path):
    array = cluster.submit("echo $SLURM_ARRAY_TASK_ID; exit $((SLURM_ARRAY_TASK_ID / 3))", "--array=0-3",
                           f"--output={tmp_path}/%A_%a")
    assert cluster.wait(array) == "COMPLETED,FAILED"
    assert (cluster.state(f"{array}_0"), cluster.state(f"{array}_3")) == ("COMPLETED", "FAILED")
    assert [(tmp_path / f"{array}_{i}").read_text() for i in range(4)] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_cluster_beside_another_takes_its_jobs_and_its_folder_with_it(cluster):
    with SlurmCluster() as second:
        job = second.submit("sleep 300 & setsid sleep 300 & wait", "--output=/dev/null")
        second.wait(job, "RUNNING")
        assert len(processes_of(str(second.folder))) > 5
    assert processes_of(str(second.folder)) == []
    assert not second.folder.exists()


def test_a_cluster_ends_with_the_process_that_started_it(cluster):
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60,
                          cwd=Path(__file__).parents[2])
    folder = done.stdout.strip()
    assert (done.returncode, folder[:11]) == (-signal.SIGKILL, "/tmp/slurm-"), done.stderr
    end = time.monotonic() + 10
    while (left := processes_of(folder)) or Path(folder).exists():
        assert time.monotonic() < end, left
        time.sleep(0.05)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm_cluster, "PATH", str(tmp_path))
    assert "slurmctld slurmd slurm-client munge" in slurm_cluster.missing()
    assert "apt-get install slurm-wlm munge" in slurm_cluster.missing()

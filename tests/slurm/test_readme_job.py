"""The README's way from an installation to a job, as it is written there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from grn_scale.checkpoint.layout import newest_complete
from grn_scale.slurm.starts import read_starts
from tests.helpers.jobs import ENVIRONMENT
from tests.helpers.slurm_cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## On a Slurm cluster")[2].partition("\n## ")[0]
LINES = [line.strip() for line in SECTION.splitlines() if re.match(r" {4}(grn-scale|python) ", line)]
SITE = re.search(r"^    # site.yaml\n((?:    .*\n)+)", SECTION, re.MULTILINE)[1]
HERE = {"partition: gpu": "partition: main", '"1-00:00:00"': '"50"', "gpus_per_node: 8": "gpus_per_node: 2",
        "cpus_per_process: 12": "cpus_per_process: 1", "packs_per_step=16": "packs_per_step=4",
        "--clips 2048": "--clips 512"}
"""What differs between the README's site and the cluster of the tests, and how many clips are enough here."""
PATIENCE_SECONDS = 240


def launch(cluster: SlurmCluster, line: str, folder: Path) -> str:
    words = shlex.split(line)
    command = [sys.executable, *(["-m", "grn_scale"] if words[0] == "grn-scale" else []), *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS, env={
        **ENVIRONMENT, **cluster.environment, "PYTHONPATH": str(ROOT), "GRN_SCALE_CLUSTER": "site.yaml"})
    assert done.returncode == 0 or "why" in words, f"$ {line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readmes_lines_lead_to_a_job_that_trains_until_it_is_cancelled(cluster: SlurmCluster,
                                                                           tmp_path: Path) -> None:
    site, lines = SITE, LINES
    for theirs, ours in HERE.items():
        site, lines = site.replace(theirs, ours), [line.replace(theirs, ours) for line in lines]
    (tmp_path / "site.yaml").write_text(re.sub("^    ", "", site, flags=re.MULTILINE), encoding="utf-8")
    run = tmp_path / "runs/first"
    *prepare, status, logs, cancel, why = lines
    assert [line.split()[2] for line in (status, logs, cancel, why)] == ["status", "logs", "cancel", "why"]
    for line in prepare:
        launch(cluster, line, tmp_path)
    end = time.monotonic() + PATIENCE_SECONDS
    for sign in ("RUNNING", "training  step ", "4 processes, none of them silent"):
        while sign not in (said := launch(cluster, status, tmp_path)):
            assert time.monotonic() < end, said
            time.sleep(1)
    assert "step 0: validation loss" in launch(cluster, logs, tmp_path)
    launch(cluster, cancel, tmp_path)
    job = (run / "slurm/0001/job-ids").read_text().split()[0]
    cluster.wait(job, timeout=PATIENCE_SECONDS)
    start, = read_starts(run / "slurm/0001")
    assert (start.code, start.decision) == (75, "cancelled") and newest_complete(run) is not None
    assert "submit it again" in launch(cluster, why, tmp_path)

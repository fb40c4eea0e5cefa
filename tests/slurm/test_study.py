"""A scaling study on a real Slurm, from its file to the report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from grn_scale.studies.results import read_results
from tests.helpers.jobs import train_arguments, write_dataset
from tests.helpers.slurm_cluster import SlurmCluster

SITE = "partition: main\ntime_limit: '10'\ngpus_per_node: 2\nsignal_seconds: 60\n"
LAYOUTS = {"dp": {}, "tp": {"parallel.tensor": 2, "zero.stage": 1}}
PROTOCOL = ("train.", "output=")


@pytest.mark.slow
def test_a_study_goes_from_its_file_to_the_report_and_runs_a_failed_cell_again(cluster: SlurmCluster,
                                                                             tmp_path: Path) -> None:
    values = [each.partition("=")[::2] for each in train_arguments(write_dataset(tmp_path / "data"), Path())[1:]
              if not each.startswith(PROTOCOL)]
    keys = {key: yaml.safe_load(value) for key, value in values} | {"data.packs_per_step": 4}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({
        "name": "small", "set": keys, "processes": [1, 2], "layouts": LAYOUTS, "repeats": 1, "warmup_steps": 2,
        "measured_steps": 6}))
    site, study = tmp_path / "site.yaml", tmp_path / "study"
    site.write_text(SITE)

    def scaling(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return cluster.run(sys.executable, "-m", "grn_scale", "scaling", *map(str, arguments), expect=expect,
                           timeout=240)

    made = scaling("generate", "--config", tmp_path / "study.yaml", f"output={study}").stdout
    assert "tp  1 processes  illegal" in made
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")
    scaling("submit", study, "--cluster", site, "--submit")
    broken = study / "cells/dp-p2-r1/attempt-0001/slurm/0001/config.yaml"  # legal when submitted, refused at its start
    broken.write_text(broken.read_text().replace("hidden_size: 32", "hidden_size: 33"))
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    scaling("submit", study, "--cluster", site, "--submit", "--wait", expect=1)
    scaling("submit", study, "--cluster", site, "--submit", "--wait")
    scaling("collect", study)
    scaling("report", study)
    rows = {row["cell"]: row for row in read_results(study)}
    assert {row["state"] for row in rows.values()} == {"measured"} and rows["tp-p2-r1"]["steps"] == 6
    again = rows["dp-p2-r1"]
    assert again["attempt"] == "attempt-0002" and rows["dp-p1-r1"]["attempt"] == "attempt-0001"
    assert again["failed_before"].startswith("attempt-0001: stopped") and not rows["dp-p1-r1"]["failed_before"]
    assert (again["node_count"], again["processes_per_node"], again["gpus_per_node"]) == (1, 2, 2)
    assert again["peak_memory_bytes"] > 1 << 20 and again["peak_memory_of"] == "process"
    for known in ("config_sha256", "commit", "torch", "megatron_core", "deepspeed", "python", "cpu", "nodes", "job",
                  "cluster", "began", "ended"):
        assert again[known] is not None, known
    assert "data:image/svg+xml" in (study / "report.html").read_text()

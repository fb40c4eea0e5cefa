"""Batch scripts: what each variant looks like, and that no value of a user is ever run."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from grn_scale.config.cluster import Cluster, Container
from grn_scale.errors import ConfigError
from grn_scale.slurm.script import BODY, Job, batch_script

GOLDEN = Path(__file__).resolve().parents[1] / "golden/slurm"
RUN = Path("/shared/runs/first")
BARE = Job(kind="train", name="train-first", cluster=Cluster.load("configs/clusters/bare_h100.yaml"), run=str(RUN),
           records=RUN / "slurm/0001", working_folder=Path("/home/someone/grn"),
           command=("train", "--config", f"{RUN}/slurm/0001/config.yaml", "--resume", "auto"), nodes=4,
           processes_per_node=8, gpus_per_node=8, cpus_per_node=96, time_limit="1-00:00:00", partition="gpu",
           account="", python="/shared/venv/bin/python", config=RUN / "slurm/0001/config.yaml")


def in_cluster(name: str, **changes: object) -> Job:
    cluster = Cluster.load(f"configs/clusters/{name}.yaml")
    return dataclasses.replace(BARE, cluster=cluster, partition=cluster.partition, account=cluster.account,
                               time_limit=cluster.time_limit, cpus_per_node=0, **changes)


VARIANTS = {
    "bare": BARE,
    "torchrun": dataclasses.replace(BARE, torchrun=True, exclude_failed=True, start_limit=5),
    "pyxis": in_cluster("pyxis_h100", python="python3", mounts=("/shared", "/home/someone/grn")),
    "apptainer_chain": in_cluster("apptainer_cpu", python="python3", mounts=("/shared", "/home/someone/grn"),
                                  gpus_per_node=0, processes_per_node=4, chain=3),
    "tokenize_array": dataclasses.replace(
        BARE, kind="tokenize", name="tokenize-tokens", run="/shared/tokens", records=Path("/shared/tokens.slurm/0001"),
        command=("tokenize", "--config", "/shared/tokens.slurm/0001/config.yaml"), nodes=1, processes_per_node=1,
        array=8, config=None),
    "convert": dataclasses.replace(
        BARE, kind="convert", name="convert-ckpt", run="/shared/ckpt", records=Path("/shared/ckpt.slurm/0001"),
        command=("convert", "--input", "GRN_T2V_2B.pth", "--from", "official", "--to", "native", "--output",
                 "/shared/ckpt"),
        nodes=1, processes_per_node=1, gpus_per_node=0, cpus_per_node=12, config=None),
}
HOSTILE = "a b'c$(touch pwned)`touch pwned`;&|*~{x}%j!"


@pytest.mark.parametrize("name", VARIANTS)
def test_script_of_each_variant(name: str, request) -> None:
    # the body is alike in all of them, and stands in slurm/job.sh
    script = batch_script(VARIANTS[name]).replace(BODY.read_text(encoding="utf-8"), "# ... job.sh\n")
    script = script.replace(f"grn_scale {__import__('grn_scale').__version__}", "grn_scale VERSION")
    path = GOLDEN / f"{name}.sbatch"
    if request.config.getoption("--write-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(script, encoding="utf-8")
    assert script == path.read_text(encoding="utf-8"), "see the difference; pytest --write-golden takes it over"


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_and_shellcheck_find_nothing_wrong(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(batch_script(VARIANTS[name]), encoding="utf-8")
    checks = [["bash", "-n"], *([["shellcheck"]] if shutil.which("shellcheck") else [])]
    for check in checks:
        done = subprocess.run([*check, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_no_value_is_run(tmp_path: Path) -> None:
    """The variables of a script with hostile values in all places, as bash reads them."""
    cluster = Cluster(name="x", processes_per_node=1, modules=(HOSTILE,), environment={"HOSTILE": HOSTILE},
                      scratch=HOSTILE, container=Container("apptainer", HOSTILE, (HOSTILE,)))
    job = dataclasses.replace(BARE, cluster=cluster, run=HOSTILE, records=Path(HOSTILE), command=("train", HOSTILE),
                              python=HOSTILE, mounts=(HOSTILE,), working_folder=Path(HOSTILE), name=HOSTILE)
    head = batch_script(job).replace(BODY.read_text(encoding="utf-8"), "")
    ending = 'printf "%s\\n" "$HOSTILE" "$TMPDIR" "$run" "$records" "${command[1]}" "${loaded[1]}"\n'
    done = subprocess.run(["bash", "-c", f'module() {{ loaded=("$@"); }}\n{head}\n{ending}'], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.splitlines() == [HOSTILE] * 6, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "a\rb"])
@pytest.mark.parametrize("place", ["name", "records", "working_folder", "account"])
def test_what_an_sbatch_line_cannot_quote_is_refused(place: str, value: str) -> None:
    kind = type(getattr(BARE, place))
    with pytest.raises(ConfigError, match="cannot hold quotes, backslashes or line breaks"):
        batch_script(dataclasses.replace(BARE, **{place: Path(value) if issubclass(kind, Path) else value}))

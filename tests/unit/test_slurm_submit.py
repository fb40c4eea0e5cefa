"""From a command line to a job: what is derived, what is refused, what a submission leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from grn_scale.config.cluster import Cluster
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError, UserError
from grn_scale.slurm import kinds, submit
from grn_scale.slurm.kinds import read_request
from grn_scale.slurm.records import newest, next_folder, records_of, submissions, write_submission
from grn_scale.slurm.script import batch_script

SITE = {"bare": "gpus_per_node: 4\n",
        "cpu": "processes_per_node: 3\ngpu_option: none\ncpus_per_process: 2\nrequeue: false\n",
        "pyxis": "gpus_per_node: 4\ncontainer:\n  runtime: pyxis\n  image: /images/a.sqsh\n"
                 "  mounts: [/opt, '/data:/mnt']\n"}


def job(kind: str, *arguments: str, site: str = "bare"):
    """The job that a command line describes."""
    path = Path(f"{site}.yaml")
    path.write_text(SITE[site], encoding="utf-8")
    options, rest = submit._parser(kind).parse_known_args([*arguments, "--print"])
    return submit.job_of(read_request(kind, rest), Cluster.load(path), options)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sizes_and_folders_follow_from_site_and_command(here: Path) -> None:
    made = job("train", "output=runs/a", "--nodes", "3", "--parallel.tensor", "2")
    assert (made.processes, made.processes_per_node, made.gpus_per_node) == (12, 4, 4)
    assert made.name == "train-a" and made.run == str(here / "runs/a")
    assert made.records == here / "runs/a/slurm/0001" and made.working_folder == here
    assert made.command == ("train", "--config", str(made.records / "config.yaml"), "--resume", "auto")
    made = job("train", "output=runs/a", "--gpus-per-node", "2", "--torchrun")
    assert (made.processes, made.tasks_per_node) == (2, 1)
    made = job("evaluate", "output=m", "--reconstruct", "data.manifest=a.jsonl", "--nodes", "2", site="cpu")
    assert (made.processes, made.gpus_per_node, made.cpus_per_node, made.goes_back) == (6, 0, 6, False)
    assert made.command == ("evaluate", "--config", str(made.records / "config.yaml"), "--reconstruct")
    made = job("tokenize", "output=t", "--retry-quarantined", "--array", "8")
    assert (made.array, made.processes, made.command[-1]) == (8, 1, "--retry-quarantined")
    assert job("evaluate", "output=m", "--held-out").processes == 1
    made = job("convert", "--input", "a b.pth", "--from", "official", "--to", "native", "--output", "ckpt")
    assert made.records == here / "ckpt.slurm/0001" and made.config is None
    assert made.command == ("convert", "--list", str(made.records / "conversions.txt"))  # so that a start can go on
    line = read_request("convert", ["--input", "a b.pth", "--from", "official", "--to", "native", "--output", "ckpt"])
    assert line.files == {"conversions.txt": "--input 'a b.pth' --from official --to native --output ckpt\n"}
    for argument, site in (("--no-preflight", ""), ("--start-limit=3", "preflight: false\n")):
        (here / "quick.yaml").write_text(SITE["bare"] + site, encoding="utf-8")
        options, rest = submit._parser("train").parse_known_args(["output=runs/a", argument, "--print"])
        assert submit.job_of(read_request("train", rest), Cluster.load("quick.yaml"), options).config is None


def test_what_a_site_or_a_user_adds_goes_to_slurm(here: Path) -> None:
    (here / "bare.yaml").write_text(SITE["bare"] + "gres_type: a100\nsbatch_options: [mail-type=END, --exclude=n7]\n"
                                    "srun_options: [mpi=pmix]\n", encoding="utf-8")
    options, rest = submit._parser("tokenize").parse_known_args(
        ["output=t", "--array", "100%8", "--sbatch", "reservation=my own", "--sbatch=--spread-job", "--print"])
    script = batch_script(submit.job_of(read_request("tokenize", rest), Cluster.load("bare.yaml"), options))
    for line in ("gpus-per-node=a100:4", "array=0-99%8", "mail-type=END", "exclude=n7", 'reservation="my own"',
                 "spread-job"):
        assert f"\n#SBATCH --{line}\n" in script
    assert "srun --mpi=pmix" not in script and "--ntasks-per-node=1 --mpi=pmix" in script
    derived = Cluster(name="x", gpus_per_node=1, srun_options=("export=NONE",))
    with pytest.raises(ConfigError, match="the job derives --export"):
        batch_script(submit.job_of(read_request("tokenize", rest), derived, options))


def test_a_container_sees_every_folder_that_the_command_names(here: Path) -> None:
    for folder in ("tokens", "elsewhere/tokens", "runs"):
        (here / folder).mkdir(parents=True)
    made = job("train", "output=runs/a", f"data.dataset={here.parent}", site="pyxis")
    # the working folder lies in the folder of the dataset
    assert made.mounts == ("/opt", "/data:/mnt", str(here.parent)) and made.python == "python3"
    assert f"--container-mounts=/opt:/opt,/data:/mnt,{here.parent}:{here.parent}" in batch_script(made)
    clips = here.parent / "clips"
    for folders, seen in (([clips / "a", clips / "b"], {clips / "a", clips / "b"}),
                          ([clips / f"{i // 9}/{i}" for i in range(99)], {clips / f"{i}" for i in range(11)})):
        for folder in folders:
            folder.mkdir(parents=True)
        lines = [json.dumps({"path": f"{folder}/1.mp4", "caption": ""}) for folder in [*folders, clips / "lost/c/d"]]
        (here / "clips.jsonl").write_text("\n".join(lines), encoding="utf-8")
        made = job("tokenize", "output=t", "data.manifest=clips.jsonl", site="pyxis")
        assert set(made.mounts) == {"/opt", "/data:/mnt", str(here), *map(str, seen)}
    for folder in ("weights", "tokenizer", "umt5", "models", "made"):
        (here.parent / folder).mkdir(exist_ok=True)
    (here.parent / "models/model.yaml").write_text("rounds: 1\n", encoding="utf-8")
    (here / "list.txt").write_text("--from hf --to hf --input ../weights --output ../made/a --tokenizer ../tokenizer "
                                   "--text-encoder ../umt5 --model ../models/model.yaml\n", encoding="utf-8")
    made = job("convert", "--list", "list.txt", site="pyxis")
    assert {Path(mount).name for mount in made.mounts} >= {"weights", "tokenizer", "umt5", "models", "made"}
    (here / "link").symlink_to(here.parent / "made")
    assert str(here.parent / "made") in job("train", "output=link/first", site="pyxis").mounts
    (here.parent / "v1:2").mkdir()
    with pytest.raises(ConfigError, match="v1:2' cannot be mounted"):
        job("train", "output=runs/a", f"data.dataset={here.parent}/v1:2", site="pyxis")
    with pytest.raises(ConfigError, match="cannot be mounted"):
        (here / "a,b").mkdir()
        os.chdir(here / "a,b")
        job("train", "output=runs/a", site="pyxis")


@pytest.mark.parametrize("arguments,words", [
    (["train", "output=a", "--array", "2"], "--array shares the work of tokenization"),
    (["tokenize", "output=a", "--array", "2", "--nodes", "2"], "leave --nodes out"),
    (["tokenize", "output=a", "--array", "2", "--chain", "2"], "exclude each other"),
    (["train", "output=a", "--container", "b.sif"], "has no container.runtime"),
    (["tokenize", "output=s3://bucket/a"], "give --records FOLDER"),
    (["train", "output=a", "--gpus-per-node", "0"], "neither gpus_per_node nor processes_per_node"),
    (["train", "output=a", "--resume", "runs/b/step-00000002"], "set init.from"),
    (["train"], "output is not set"),
    (["train", "output=a", "data.tokn_budget=3"], "did you mean data.token_budget"),
    (["train", "output=a", "--time", "soon"], "is no time limit"),
    (["train", "output=a", "--partiton", "main"], "the job has --partition"),
    (["tokenize", "output=a", "--array", "8%0"], "no whole number above 0"),
    (["train", "output=a", "--sbatch", "reservation name"], "none of the long options"),
    (["train", "output=a", "--sbatch", "nodes=4"], "give --nodes"),
    (["train", "output=a", "--sbatch=--signal=9"], "give signal_seconds in the cluster file"),
    (["train", "output=a", "--chain", "2", "--sbatch", "dependency=afterok:1"], "the job has it already"),
    (["train", "output=a", "--partition", "a", "--sbatch", "partition=b"], "the job has it already"),
    (["train", "output=a", "--wait"], "give it with --submit"),
    (["train", "output=a", "--exclude-failed-nodes"], "has requeue: false"),
    (["train", "output=a", "--nodes", "0"], "no whole number above 0"),
    (["train", "output=a", "--time", "3"], "leaves no time to train"),
    (["train", "output=runs/lr:1"], "a path with a colon"),
    (["evaluate", "--held-out", "output=a", "--nodes", "2"], "this is one process"),
])
def test_contradictions_are_refused(arguments: list[str], words: str) -> None:
    requeue = "requeue: false\n" if "--exclude-failed-nodes" in arguments else ""
    Path("site.yaml").write_text(SITE["bare"] + requeue, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        submit.main(arguments[0], [*arguments[1:], "--cluster", "site.yaml", "--print"])


@pytest.mark.parametrize("text,words", [
    ("gpus_per_nodes: 8\n", "did you mean gpus_per_node"), ("partition: a; rm -rf\n", "partition is 'a; rm -rf'"),
    ("container:\n  runtime: docker\n", "container.runtime is 'docker'"),
    ("container:\n  runtime: pyxis\n", "container.image is empty"),
    ("time_limit: soon\n", "time_limit is 'soon'"), ("time_limit: 12:00:00\n", "must be text: write it in quotes"),
    ("srun_options: [-x]\n", "srun_options holds '-x'"),
    ("container:\n  runtime: pyxis\n  image: a.sqsh\n", "give the file's whole path"),
    ("environment: [a]\n", "must hold names and values"),
    ("environment:\n  A B: c\n", "is no name of a variable"), ("environment:\n  A: 1\n", "environment.A is 1"),
    ("gpu_option: magic\n", "gpu_option is 'magic'"), ("signal_seconds: 0\n", "signal_seconds"),
])
def test_a_site_file_is_read_strictly(here: Path, text: str, words: str) -> None:
    (here / "site.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="site.yaml: ") as error:
        Cluster.load(here / "site.yaml")
    assert words in str(error.value)


def test_the_shipped_sites_are_legal() -> None:
    for name in ("bare_h100", "pyxis_h100", "apptainer_cpu"):
        assert Cluster.load(f"configs/clusters/{name}.yaml").name == name


def test_records_hold_the_code_and_configuration_that_run(here: Path) -> None:
    made = job("train", "output=runs/a", "optimizer.lr=0.5")
    request = read_request("train", ["output=runs/a", "optimizer.lr=0.5"])
    write_submission(made, batch_script(made), request.files)
    again = newest("runs/a")
    assert again.folder == here / "runs/a/slurm/0001" and again.job_ids == []
    assert again.facts["processes"] == 4 and again.facts["command"] == list(made.command)
    assert {"torch", "python"} <= again.facts["versions"].keys()
    assert load_config(again.folder / "config.yaml").optimizer.lr == 0.5
    # the copy is complete: it runs where nothing else of the project is on the path
    code = ("import grn_scale, grn_scale.slurm.task as task, grn_scale.pretrain.train, grn_scale.tokenizer as t;"
            "from grn_scale.config.load import shipped_file;"
            "print(task.__file__); print(shipped_file('runs/demo.yaml').is_file(), t.load_tokenizer is not None)")
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(again.folder / "code")})
    assert done.stdout.split() == [str(again.folder / "code/grn_scale/slurm/task.py"), "True", "True"]
    assert next_folder(records_of("runs/a")) == Path("runs/a/slurm/0002")
    assert [each.folder.name for each in submissions("runs/a")] == ["0001"]
    with pytest.raises(FileExistsError):
        write_submission(made, "", {})
    with pytest.raises(UserError, match="no submission"):
        newest("runs/b")


def test_processes_in_a_container_see_the_image_and_the_job_and_nothing_of_the_login_shell(here: Path) -> None:
    (here / "a.sqsh").write_bytes(b"123")
    SITE["image"] = SITE["pyxis"].replace("/images", str(here)) + "environment: {PYTHONPATH: /opt/more}\n"
    made = job("train", "output=runs/a", site="image")
    script = batch_script(made)
    assert f"\nexport PYTHONPATH={made.records}/code:/opt/more\n" in script and "$PYTHONPATH" not in script
    assert "\nexport PYTHONNOUSERSITE=1\n" in script
    write_submission(made, script, {})
    image = newest("runs/a").facts["image"]
    assert (image["runtime"], image["image"], image["bytes"]) == ("pyxis", str(here / "a.sqsh"), 3)
    write_submission(job("train", "output=runs/b"), "", {})
    assert newest("runs/b").facts["image"] is None


def test_what_the_job_would_refuse_is_refused_before_anything_is_written(here: Path, capsys) -> None:
    from grn_scale.cli import main

    (here / "site.yaml").write_text(SITE["bare"], encoding="utf-8")
    poisoned = ["slurm", "train", "--cluster", "site.yaml", "output=runs/a", "data.dataset=nowhere",
                "data.packs_per_step=4"]
    for how in ("--dry-run", "--submit"):
        assert main([*poisoned, "parallel.tensor=3", how]) == 2
        assert "parallel.tensor" in capsys.readouterr().err
        assert main([*poisoned, how]) in (1, 2)
        assert "nowhere" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["site.yaml"]
    # the script itself can be looked at
    assert main([*poisoned, "--print"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=train-a\n")
    assert [path.name for path in here.iterdir()] == ["site.yaml"]


def test_memory_is_told_before_submission_where_the_site_names_its_gpus(here: Path, caplog) -> None:
    large = ["output=runs/a", "model=configs/model/grn_8b.yaml", "data.packs_per_step=8"]

    def check(site: str, *more: str) -> str:
        (here / "site.yaml").write_text(site, encoding="utf-8")
        options, rest = submit._parser("train").parse_known_args([*large, *more, "--print"])
        request = read_request("train", rest)
        made = submit.job_of(request, Cluster.load("site.yaml"), options)
        caplog.clear()
        with caplog.at_level("INFO", "grn_scale"):
            kinds._check_memory(load_config(None, rest), made)
        return caplog.text

    assert check("gpus_per_node: 8\n") == ""
    assert "GB on the fullest GPU" in check("gpus_per_node: 8\ngpu: H200\n", "data.token_budget=8192")
    with pytest.raises(UserError, match=r"would take .* nearest settings that fit: parallel.tensor=8 .*plan"):
        check("gpus_per_node: 8\ngpu: H100\n", "data.token_budget=65536")
    with pytest.raises(ConfigError, match="X9"):
        check("gpus_per_node: 8\ngpu: X9\n")


def test_time_limits_in_all_forms_of_slurm() -> None:
    limits = {"90": 5400, "90:30": 5430, "1:02:03": 3723, "2-1": 176400, "2-1:30": 178200, "1-00:00:01": 86401}
    assert {limit: submit.seconds_of(limit) for limit in limits} == limits


def test_a_run_that_trains_already_is_not_trained_into(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = job("train", "output=runs/a")
    write_submission(first, "", {})
    (first.records / "job-ids").write_text("7\n", encoding="utf-8")
    squeue = here / "bin/squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho '7|RUNNING|node1|1|2|None'\n", encoding="utf-8")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"job 7 \(RUNNING\) trains into .*runs/a: cancel it first"):
        submit.refuse_second(job("train", "output=runs/a"))
    squeue.write_text("#!/bin/sh\necho '7|COMPLETED|node1|1|2|None'\n", encoding="utf-8")
    submit.refuse_second(job("train", "output=runs/a"))


def test_without_sbatch_a_submission_says_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job("evaluate", "output=m", "--held-out").processes == 1
    made = job("convert", "--input", "a", "--from", "official", "--to", "native", "--output", "ckpt")
    monkeypatch.setenv("PATH", str(here))
    with pytest.raises(UserError, match="no sbatch on PATH"):
        submit.submit(made, "", {})
    assert not made.records.exists()


@pytest.mark.parametrize("answer, code, told", [
    ("echo 'you have 42 SUs left'; echo 4711", 0, ""), ("echo '4711;main'", 0, ""),
    ("echo welcome", 0, "gave no number: 'welcome'"),
    ("echo 'Batch job submission failed: Socket timed out on send/recv operation' >&2", 1,
     "sbatch got no answer .* `squeue --me --name=train-a`"),
    ("echo 'Invalid account' >&2", 1, "sbatch refused the job: Invalid account")])
def test_only_a_number_that_sbatch_gave_is_taken(here: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int,
                                                 told: str) -> None:
    sbatch = here / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\n{answer}\nexit {code}\n", encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    made = job("train", "output=runs/a")
    if told:
        with pytest.raises(UserError, match=told):
            submit.submit(made, batch_script(made), {})
        assert newest("runs/a").job_ids == []
    else:
        assert submit.submit(made, batch_script(made), {}) == newest("runs/a").job_ids == ["4711"]


def test_a_conversion_may_ask_for_gpus() -> None:
    command = ("--input", "a", "--from", "official", "--to", "native", "--output", "ckpt")
    assert job("convert", *command).gpus_per_node == 0
    made = job("convert", *command, "--gpus-per-node", "1")
    assert (made.gpus_per_node, made.processes) == (1, 1) and "gpus-per-node=1" in batch_script(made)
    with pytest.raises(ConfigError, match="'-1' is no whole number, 0 or more"):
        job("convert", *command, "--gpus-per-node=-1")


def test_what_pyxis_cannot_mount_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "sp ace").mkdir()
    monkeypatch.chdir(here / "sp ace")
    with pytest.raises(ConfigError, match="with pyxis blanks"):
        job("train", "output=runs/a", site="pyxis")


@pytest.mark.parametrize("site, key", [
    ("environment: {PATH: '/x:$PATH'}", r"environment\.PATH"), ("scratch: /scratch/${USER}", "scratch"),
    ("container: {runtime: apptainer, image: ~/a.sif}", r"container\.image"),
    ("container: {runtime: apptainer, image: a.sif, mounts: ['$HOME/data']}", r"container\.mounts")])
def test_a_variable_in_a_cluster_file_is_refused(here: Path, site: str, key: str) -> None:
    (here / "site.yaml").write_text(f"gpus_per_node: 4\n{site}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{key} is .* nothing is expanded"):
        Cluster.load(here / "site.yaml")


def test_sbatch_gets_the_script_and_its_number_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = here / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@" >> "$0.calls"\nwc -l < "$0.calls" | tr -d " "\n', encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    made = job("train", "output=runs/a", "--chain", "3", site="cpu")
    assert submit.submit(made, batch_script(made), {}) == ["1", "2", "3"]
    script = str(made.records / "job.sbatch")
    dropped = "--kill-on-invalid-dep=yes"
    assert (here / "bin/sbatch.calls").read_text().splitlines() == [
        f"--parsable {script}", f"--parsable --dependency=afternotok:1 {dropped} {script}",
        f"--parsable --dependency=afternotok:1:2 {dropped} {script}"]
    assert newest("runs/a").job_ids == ["1", "2", "3"]
    assert json.loads((made.records / "submission.json").read_text())["chain"] == 3

"""What is kept of a job: a numbered folder for each submission, beside or inside what the job writes.

    RUN/slurm/0001/       RUN.slurm/0001/ of tokenization and conversion
      job.sbatch          the script
      submission.json     what was asked for, from which code (`Submission`)
      config.yaml         the resolved configuration
      code/grn_scale/     the package as it was, which is what runs
      job-ids             Slurm's numbers, a line each
      starts.jsonl        every start and end of the job, written by the script (starts.py; starts.TASK.jsonl)
      logs/               of the script, and of each process of each start
      preflight/          what was found on each node
      cancelled, stopped  marks after which the job does not start again (stopped.TASK: an element of an array)
      crash-loop          progress at the last start, and starts without any since (crash-loop.TASK)
"""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grn_scale
from grn_scale.atomic import write_bytes, write_json
from grn_scale.config.cluster import Container
from grn_scale.errors import UserError
from grn_scale.slurm.script import Job

SCRIPT = "job.sbatch"
SUBMISSION = "submission.json"
CONFIG = "config.yaml"
CODE = "code"
JOB_IDS = "job-ids"
LOGS = "logs"
VERSIONS = "versions.json"
"""Beside the logs of a start: what its processes run with."""
CANCELLED = "cancelled"
STOPPED = "stopped"
_NUMBER = re.compile(r"\d{4,}")


@dataclass(frozen=True)
class Submission:
    """One submission, read back from its folder."""

    folder: Path
    facts: dict[str, Any]
    """submission.json: kind, name, run, command, nodes, processes_per_node, processes, gpus_per_node, array, chain,
    time_limit, cluster, submitted (Unix time), host, user, git, versions (of the submitting environment; each
    start leaves those of its processes beside their logs), image (of a container; null without)."""

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """UserError where the folder is not that of a submission."""
        path = folder / SUBMISSION
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as a submission ({error})") from error
        if not isinstance(facts, dict):
            raise UserError(f"{path}: holds no JSON object")
        return cls(folder, facts)

    @property
    def job_ids(self) -> list[str]:
        """Slurm's numbers of its jobs, those of a chain in order; empty where sbatch has not answered."""
        path = self.folder / JOB_IDS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return list(dict.fromkeys(line for line in lines if line.isdecimal()))  # the script may have been quicker

    @property
    def kind(self) -> str:
        return self.facts["kind"]


def records_of(run: str | Path) -> Path:
    """The folder of a run's submissions: RUN/slurm, or RUN.slurm where that is what exists, or RUN is a URL."""
    text = str(run).rstrip("/")
    inside, beside = Path(text) / "slurm", Path(f"{text.rpartition('/')[2] if '://' in text else text}.slurm")
    return beside if "://" in text or beside.is_dir() and not inside.is_dir() else inside


def submissions(run: str | Path) -> list[Submission]:
    """Submissions of a run, oldest first. `run` may also be the folder of submissions or of one of them.

    UserError where there is none.
    """
    for folder in (Path(run).absolute(), records_of(run).absolute()):
        if (folder / SUBMISSION).is_file():
            return [Submission.read(folder)]
        found = [entry for entry in numbered(folder) if (entry / SUBMISSION).is_file()]
        if found:
            return [Submission.read(entry) for entry in found]
    raise UserError(f"{run}: no submission of `grn-scale slurm` there (looked for {records_of(run)}/0001); give the "
                    "output folder of the job, or what --records named")


def newest(run: str | Path) -> Submission:
    """The last submission of a run; UserError where there is none."""
    return submissions(run)[-1]


def next_folder(parent: Path) -> Path:
    """Folder that the next submission gets; it is not made."""
    numbers = [int(entry.name) for entry in numbered(parent)]
    return parent / f"{max(numbers, default=0) + 1:04d}"


def write_submission(job: Job, script: str, files: Mapping[str, str]) -> None:
    """Make the folder of a submission with everything that the job needs.

    files: name -> text of what its command reads there. FileExistsError where the folder exists:
    another submission took the number.
    """
    job.records.mkdir(parents=True)
    (job.records / LOGS).mkdir()  # sbatch makes no folders
    copy_code(job.records / CODE)
    for name, text in files.items():
        write_bytes(job.records / name, text.encode())
    facts = {"kind": job.kind, "name": job.name, "run": job.run, "command": list(job.command), "nodes": job.nodes,
             "processes_per_node": job.processes_per_node, "processes": job.processes,
             "gpus_per_node": job.gpus_per_node, "array": job.array or None, "chain": job.chain,
             "time_limit": job.time_limit, "cluster": job.cluster.name, "submitted": round(time.time(), 3),
             "host": socket.gethostname(), "user": getpass.getuser(), "git": git_state(), "versions": versions(),
             "image": image_state(job.cluster.container)}
    write_json(job.records / SUBMISSION, facts)
    write_bytes(job.records / SCRIPT, script.encode())


def copy_code(target: Path) -> None:
    """Copy the package, wherever its parts lie, to `target`/grn_scale, without what tests and caches leave."""
    root = Path(grn_scale.__path__[0])
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(root, target / "grn_scale", ignore=ignore)
    for name in _programs():
        if not (target / "grn_scale" / name).exists():  # beside the library in a checkout, inside it in a wheel
            shutil.copytree(root.parent / name, target / "grn_scale" / name, ignore=ignore)


def _programs() -> tuple[str, ...]:
    return ("configs", "data_pipeline", "pretrain", "slurm", "tools")


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code runs from and whether it has changes; None without git or a checkout."""
    folder = Path(grn_scale.__path__[0]).parent
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    commit, status = (subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False)
                      for command in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())} if commit.returncode == 0 else None


def image_state(container: Container) -> dict[str, Any] | None:
    """A container's image, with size and time of the file where it is one; None without a container."""
    if container.runtime == "none":
        return None
    path = Path(container.image)
    facts = path.stat() if path.exists() else None
    return {"runtime": container.runtime, "image": container.image, "bytes": facts and facts.st_size,
            "modified": facts and round(facts.st_mtime, 3)}


def versions() -> dict[str, str]:
    """Every installed distribution and the interpreter, as this process's environment has them."""
    found = {name: each.version for each in importlib.metadata.distributions()
             if (name := each.metadata["Name"])}  # a half-removed one has none
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def numbered(folder: Path) -> list[Path]:
    """Folders of submissions, in their order."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted((entry for entry in entries if _NUMBER.fullmatch(entry.name) and entry.is_dir()),
                  key=lambda entry: int(entry.name))

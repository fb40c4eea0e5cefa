"""The records of a submission as its jobs leave them, and Slurm commands that answer what a test tells them to."""

import json
import os
import time

from grn_scale.slurm.starts import file_of

NOW = int(time.time())
RUNNING = f"12|RUNNING|node[1-2]|{NOW - 50}|{NOW + 3600}|None"
PENDING = f"12|PENDING||{NOW + 120}|N/A|BeginTime"
"""Lines of squeue."""


class Job:
    """The records of a submission, as job.sh and the processes of the job write them."""

    def __init__(self, run, number=1, **facts):
        self.run, self.folder = run, run / "slurm" / f"{number:04d}"
        self.folder.mkdir(parents=True)
        self.facts = {"kind": "train", "name": "a", "run": str(run), "nodes": 2, "processes_per_node": 2,
                      "array": None, "chain": 1, **facts}
        (self.folder / "submission.json").write_text(json.dumps(self.facts))
        self.ids(12)

    def ids(self, *ids):
        (self.folder / "job-ids").write_text("".join(f"{number}\n" for number in ids))

    def event(self, event, restart=0, ago=100, progress=0, task=None, job=12, **fields):
        fields = {"nodes": "node[1-2]"} if event == "start" else fields
        with open(file_of(self.folder, task), "a") as file:
            file.write(json.dumps({"event": event, "job": job, "task": task, "restart": restart, "time": NOW - ago,
                                   "progress": progress, **fields}) + "\n")
        return self

    def ended(self, code, decision, restart=0, ago=100, **fields):
        """A start of ten seconds."""
        self.event("start", restart, ago + 10, **fields)
        return self.event("end", restart, ago, code=code, decision=decision, **fields)

    def log(self, rank, text, name="12-0", age=0):
        path = self.folder / "logs" / name / f"rank-{rank:05d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        os.utime(path, (NOW - age, NOW - age))
        return self

    def batch(self, text, name="12"):
        path = self.folder / "logs" / f"job-{name}.out"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return self


class Slurm:
    """squeue and scancel, as soon as it `says` something; nothing else is on PATH."""

    def __init__(self, folder, monkeypatch):
        self._bin, self._answer = folder / "bin", folder / "answer"
        self._questions, self._calls = folder / "questions", folder / "calls"
        self._bin.mkdir()
        monkeypatch.setenv("PATH", str(self._bin))

    def says(self, *lines, problem=""):
        """Lines of squeue's answer; problem: on its stderr, and it fails."""
        self._answer.write_text("".join(f"{line}\n" for line in lines))
        answer = f"echo '{problem}' >&2; exit 1" if problem else f"/bin/cat '{self._answer}'"
        self._script("squeue", f"echo \"$@\" >> '{self._questions}'\n{answer}")
        self._script("scancel", f"echo \"$@\" >> '{self._calls}'")
        return self

    def refuses(self):
        self._script("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")

    @property
    def questions(self):
        """Arguments of each squeue."""
        return self._questions.read_text().splitlines()

    @property
    def calls(self):
        """Arguments of each scancel."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def _script(self, name, text):
        (self._bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self._bin / name).chmod(0o755)


def answer_of(main, job, capsys, *options):
    assert main([str(job.run), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def text_of(main, job, capsys, *options):
    assert main([str(job.run), *options]) == 0
    return " ".join(capsys.readouterr().out.split())

"""What Slurm itself said of a start, in the log of its batch script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_START = re.compile(r"^\S+Z start (\d+) of job (\S+) on ", re.MULTILINE)
"""job.sh's first line of each start."""
_JOB = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON (?P<node>\S+) CANCELLED AT \S+(?: DUE TO (?P<cause>[A-Za-z ]+))?")
_TASK = re.compile(r"srun: error: (?P<node>[^\s:]+): (?P<all>tasks? (?P<rank>\d+)[\d,-]*: (?P<how>.*))")
_NODE = re.compile(r"srun: error: Node failure on (?P<node>\S+)")
_MEMORY = re.compile(r"(?i)oom[-_ ]kill|out of memory")
KILLED_FOR_MEMORY = "was killed for its memory"
_CAUSES = {"TIME LIMIT": "its time limit was reached", "PREEMPTION": "it was preempted by another job",
           "NODE FAILURE": "a node failed", "JOB REQUEUE": "it was put back into the queue",
           "JOB NOT RUNNING": "Slurm found its processes gone"}


@dataclass(frozen=True)
class Event:
    """Something that Slurm told."""

    kind: str
    """job: why it ended; task: a process ended badly; memory: something was killed for its memory; node: one failed."""
    line: str
    what: str
    """In words."""
    node: str = ""
    rank: int | None = None

    @property
    def memory(self) -> bool:
        return self.kind == "memory" or self.what == KILLED_FOR_MEMORY


def of_start(log: str, restart: int) -> str:
    """The part of a batch script's log that belongs to one start."""
    heads = list(_START.finditer(log))
    for number, head in reversed(list(enumerate(heads))):
        if int(head[1]) == restart:
            return log[head.start():heads[number + 1].start() if number + 1 < len(heads) else len(log)]
    return ""


def events(log: str) -> Iterator[Event]:
    """What Slurm told, in order."""
    for line in log.splitlines():
        job, task, node = _JOB.search(line), _TASK.search(line), _NODE.search(line)
        if task:
            how = KILLED_FOR_MEMORY if _MEMORY.search(task["how"]) else f"ended ({task['all']})"
            yield Event("task", line, how, task["node"], int(task["rank"]))
        elif node:
            yield Event("node", line, f"the node {node['node']} failed", node["node"])
        elif job and job["cause"]:
            cause = job["cause"].strip()
            yield Event("job", line, _CAUSES.get(cause, f"Slurm ended it: {cause.lower()}"), job["node"])
        elif job and " JOB " in line:
            yield Event("job", line, "it was cancelled", job["node"])
        elif _MEMORY.search(line) and "slurm" in line:
            yield Event("memory", line, KILLED_FOR_MEMORY)

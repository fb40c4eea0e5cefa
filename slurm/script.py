"""The batch script of a job: what is its own as #SBATCH lines and variables, then job.sh, which is alike for all.

Every value is quoted for the shell, so none is ever run; what the #SBATCH lines cannot quote is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grn_scale import __version__
from grn_scale.config.cluster import Cluster
from grn_scale.errors import ConfigError

BODY = Path(__file__).with_name("job.sh")
PREFLIGHT_SECONDS = 300
_MEETING = ("MASTER_ADDR", "MASTER_PORT", "GRN_SCALE_NODES", "SLURM_JOB_END_TIME")
"""Variables that job.sh exports."""
_SET_BY = {"job-name": "--name", "output": "--records", "wait": "--wait", "array": "--array",
           "gpus-per-node": "--gpus-per-node", "nodes": "--nodes", "time": "--time",
           "gres": "gpu_option in the cluster file", "cpus-per-task": "cpus_per_process in the cluster file",
           "signal": "signal_seconds in the cluster file", "export": "environment in the cluster file",
           "requeue": "requeue in the cluster file", "no-requeue": "requeue in the cluster file",
           **dict.fromkeys(("chdir", "open-mode", "ntasks", "ntasks-per-node", "ntasks-per-gpu", "error", "input",
                            "wrap", "parsable", "test-only", "kill-on-invalid-dep", "clusters"), "")}
"""Options of sbatch that always follow from something else, and from what; or that would break the job."""
_SRUN_SETS = {"export", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit", "time", "output",
              "error", "input", "label", "chdir", "gpus-per-task", "container-image", "container-mounts",
              "container-workdir", "container-env"}
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+=,-]+")
_LINE_CHARACTERS = 118


@dataclass(frozen=True)
class Job:
    """What a submission asks for, with everything derived that follows from something else."""

    kind: str
    """train, tokenize, convert or evaluate."""
    name: str
    cluster: Cluster
    run: str
    """Where the command writes: absolute path or URL."""
    records: Path
    """Folder of this submission."""
    working_folder: Path
    command: tuple[str, ...]
    """Arguments of grn-scale."""
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    cpus_per_node: int
    """0: not asked for."""
    time_limit: str
    partition: str
    account: str
    python: str
    """Interpreter of the processes, in the container where there is one."""
    mounts: tuple[str, ...] = ()
    """Folders that a container gets to see."""
    config: Path | None = None
    """Resolved configuration, for the preflight; None: no preflight."""
    array: int = 0
    """Number of elements; 0: no array."""
    at_once: int = 0
    """How many of them may run at a time; 0: all."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, beside those of the cluster."""
    chain: int = 1
    """Jobs submitted, each of which waits for the one before."""
    start_limit: int = 3
    """Starts in a row without progress that end the job."""
    exclude_failed: bool = False
    """Go back into the queue without the nodes that fail the preflight."""
    torchrun: bool = False
    """One torchrun a node starts the processes, in place of srun."""

    @property
    def processes(self) -> int:
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """What srun starts on a node."""
        return 1 if self.torchrun else self.processes_per_node

    @property
    def goes_back(self) -> bool:
        """Whether the job goes back into the queue when it has to go on."""
        return self.cluster.requeue and self.chain == 1


def batch_script(job: Job) -> str:
    """Text of the script. ConfigError for a value that a #SBATCH line cannot hold."""
    shell = "#!/bin/bash -l" if job.cluster.modules else "#!/bin/bash"  # a login shell knows `module`
    lines = [shell, *(f"#SBATCH {option}" for option in sbatch_options(job)),
             f"# Written by grn_scale {__version__}: `grn-scale slurm {job.kind}`.",
             "# shellcheck disable=SC2016,SC2317  # what is quoted stays as it is; traps call functions", "",
             "asked=0", "trap asked=1 USR2 TERM  # until there is something to stop"]
    lines += ["lost_module=", *(f"module load {name} || lost_module={name}"
                                for name in map(shlex.quote, job.cluster.modules))]
    lines += ["set -uo pipefail", *(f"export {name}={value}" for name, value in _variables(job)), ""]
    for name, value in (("kind", job.kind), ("run", job.run), ("records", job.records),
                        ("start_limit", job.start_limit), ("requeue", int(job.goes_back)),
                        ("chain", job.chain),
                        ("signal_seconds", job.cluster.signal_seconds), ("exclude_failed", int(job.exclude_failed))):
        lines.append(f"{name}={shlex.quote(str(value))}")
    lines += [_array("preflight", preflight_command(job)), _array("launch", launch_command(job)),
              _array("command", job.command), "", BODY.read_text(encoding="utf-8")]
    return "\n".join(lines)


def sbatch_options(job: Job) -> Iterator[str]:
    """Options of sbatch as its #SBATCH lines spell them."""
    cluster = job.cluster
    per_node = job.tasks_per_node
    values: list[tuple[str, str | int]] = [
        ("job-name", job.name), ("chdir", str(job.working_folder)),
        ("output", _pattern(job.records / "logs") + ("/job-%A_%a.out" if job.array else "/job-%j.out")),
        ("open-mode", "append"), ("nodes", job.nodes), ("ntasks-per-node", per_node)]
    gpus = ":".join(filter(None, [cluster.gres_type, str(job.gpus_per_node)]))
    if job.gpus_per_node and cluster.gpu_option != "none":
        values.append(("gres", f"gpu:{gpus}") if cluster.gpu_option == "gres" else ("gpus-per-node", gpus))
    values += [(name, value) for name, value in (
        ("cpus-per-task", job.cpus_per_node // per_node), ("mem", cluster.memory), ("time", job.time_limit),
        ("partition", job.partition), ("account", job.account), ("qos", cluster.qos),
        ("constraint", cluster.constraint),
        ("array", f"0-{job.array - 1}{f'%{job.at_once}' * bool(job.at_once)}" if job.array else "")) if value]
    yield from (f"--{name}={_quoted(name, str(value))}" for name, value in values)
    for option in (*cluster.sbatch_options, *job.sbatch):
        name, equals, value = option.removeprefix("--").partition("=")
        given = {name for name, _ in values} | ({"exclusive"} if cluster.exclusive else set()) | (
            {"dependency"} if job.chain > 1 else set())
        if name in _SET_BY or name in given:
            remedy = f"give {_SET_BY[name]}" if _SET_BY.get(name) else "leave it out"
            raise ConfigError(f"sbatch's --{name} is no further option, the job has it already: {remedy}")
        yield f"--{name}={_quoted(name, value)}" if equals else f"--{name}"
    if cluster.exclusive:
        yield "--exclusive"
    yield "--requeue" if job.goes_back else "--no-requeue"
    yield f"--signal=B:USR2@{cluster.signal_seconds}"


def launch_command(job: Job) -> list[str]:
    """What starts a process for each GPU (one torchrun a node with torchrun), up to the arguments of task.py."""
    torchrun = ["--torchrun", str(job.processes_per_node)] if job.torchrun else []
    return [*_srun(job, job.tasks_per_node), "--kill-on-bad-exit=1", *_in_container(job), job.python, "-u", "-m",
            "grn_scale.slurm.task", *torchrun]


def preflight_command(job: Job) -> list[str]:
    """What looks at each node before the job starts, up to the folder for its results; empty where there is
    nothing to look at."""
    if job.config is None:
        return []
    # one that fails must not end the others before they have said what they found; a hanging start has an end, too
    container = job.cluster.container
    image_seconds = 0 if container.runtime == "none" else container.start_seconds
    seconds = PREFLIGHT_SECONDS + image_seconds  # some nodes may have to wait for others that fetch it
    srun = [*_srun(job, 1), "--kill-on-bad-exit=0", f"--time={(seconds + image_seconds) // 60 + 2}"]
    command = [*srun, *_in_container(job), job.python, "-u", "-m", "grn_scale.slurm.preflight",
               "--config", str(job.config), "--gpus-per-node", str(job.gpus_per_node),
               "--seconds", str(seconds)]
    if job.cluster.minimum_bandwidth:
        command += ["--minimum-bandwidth", str(job.cluster.minimum_bandwidth)]
    return command


def _srun(job: Job, per_node: int) -> list[str]:
    # an --export of the submission would hold for srun, too, and leave processes without PATH
    for option in job.cluster.srun_options:
        name = option.removeprefix("--").partition("=")[0]
        if name in _SRUN_SETS:
            raise ConfigError(f"srun_options in the cluster file holds {option}, but the job derives --{name}: leave "
                              "it out")
    options = ["--export=ALL", f"--nodes={job.nodes}", f"--ntasks={job.nodes * per_node}",
               f"--ntasks-per-node={per_node}",
               *(f"--{option.removeprefix('--')}" for option in job.cluster.srun_options)]
    if job.cpus_per_node:  # srun does not take it from the job
        options.append(f"--cpus-per-task={job.cpus_per_node // per_node}")
    container = job.cluster.container
    if container.runtime == "pyxis":
        options += [f"--container-image={container.image}", f"--container-workdir={job.working_folder}",
                    f"--container-mounts={','.join(_both(mount) for mount in job.mounts)}",
                    # where the image has variables of these names, the job's hold
                    f"--container-env={','.join(dict.fromkeys([*(name for name, _ in _variables(job)), *_MEETING]))}"]
    return ["srun", *options]


def _in_container(job: Job) -> list[str]:
    container = job.cluster.container
    if container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if job.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", ",".join(_both(mount) for mount in job.mounts),
            "--pwd", str(job.working_folder), container.image]


def _both(mount: str) -> str:
    """SOURCE:TARGET of a mount."""
    return mount if ":" in mount else f"{mount}:{mount}"


def _variables(job: Job) -> list[tuple[str, str]]:
    """What the processes' environment has from the job, in order: names, and values as bash reads them."""
    values = dict(job.cluster.environment)
    if job.cluster.scratch:
        values["TMPDIR"] = job.cluster.scratch
    # the code of the job's folder, also where the working folder is a checkout
    code, bare = shlex.quote(str(job.records / "code")), job.cluster.container.runtime == "none"
    if not bare:  # what the login shell or the home folder holds is for another interpreter than the image's
        code = shlex.quote(":".join([str(job.records / "code"), *filter(None, [values.pop("PYTHONPATH", "")])]))
        values["PYTHONNOUSERSITE"] = "1"
    return [*((name, shlex.quote(value)) for name, value in values.items()), ("PYTHONSAFEPATH", "1"),
            ("PYTHONPATH", f"{code}${{PYTHONPATH:+:$PYTHONPATH}}" if bare else code)]


def _array(name: str, words: Sequence[str]) -> str:
    """A bash array, filled into lines."""
    lines, line = [], f"{name}=("
    for word in (f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words):
        if len(line) + len(word) > _LINE_CHARACTERS:
            lines.append(line.rstrip())
            line = "    "
        line += f"{word} "
    return "\n".join([*lines, line.rstrip() + ")"])


def _pattern(path: Path) -> str:
    """A path in which sbatch shall replace nothing."""
    return str(path).replace("%", "%%")


def _quoted(option: str, value: str) -> str:
    if any(character in value for character in "\"\\\n\r\0"):
        raise ConfigError(f"--{option} would be {value!r}, but a batch script cannot hold quotes, backslashes or line "
                          "breaks there: use another name or folder")
    return value if _PLAIN.fullmatch(value) else f'"{value}"'

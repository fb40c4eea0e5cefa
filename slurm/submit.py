"""`grn-scale slurm train|tokenize|convert|evaluate`: show, try or submit the job that runs a command."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from grn_scale.atomic import append_line
from grn_scale.command_line import CommandParser, start_logging
from grn_scale.config.cluster import OPTION, OPTION_FORM, TIME, Cluster
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError
from grn_scale.slurm.kinds import Request, read_request
from grn_scale.slurm.records import (
    CONFIG,
    JOB_IDS,
    SCRIPT,
    SUBMISSION,
    Submission,
    next_folder,
    numbered,
    write_submission,
)
from grn_scale.slurm.script import Job, batch_script
from grn_scale.slurm.squeue import Queue, ask
from grn_scale.slurm.waiting import wait_for

CLUSTER_VARIABLE = "GRN_SCALE_CLUSTER"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_CHARACTERS = 64
_PARSABLE = re.compile(r"\d+(;\S+)?")
"""What `sbatch --parsable` prints: number, cluster."""
STARTING_SECONDS = 60
"""What a job needs at least before it can save."""

log = logging.getLogger("grn_scale")


def main(kind: str, argv: list[str]) -> int:
    """Show, try or submit the job; the exit code, with --wait that of the job."""
    parser = _parser(kind)
    options, arguments = parser.parse_known_args(argv)
    start_logging()
    if options.wait and not options.submit:
        raise ConfigError("--wait stays until a submitted job has ended: give it with --submit, or leave it out")
    cluster = Cluster.load(_cluster_file(options))
    try:
        request = read_request(kind, arguments)
    except ConfigError as error:
        raise ConfigError(f"{error}{_hint(parser, arguments)}") from error
    job = job_of(request, cluster, options)
    script = batch_script(job)
    if options.print:
        print(script, end="")
        return 0
    request.check(job)
    if options.dry_run:
        return try_script(script)
    submit(job, script, request.files)
    return wait_for(job.records) if options.wait else 0


def job_of(request: Request, cluster: Cluster, options: argparse.Namespace) -> Job:
    """The job with everything derived: number of processes, folders, mounts. ConfigError where options contradict each
    other or the cluster."""
    gpus = cluster.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    if request.kind == "convert" and options.gpus_per_node is None:
        gpus = 0
    shares = gpus or cluster.processes_per_node or int(request.alone)
    if shares < 1:
        raise ConfigError(f"the cluster {cluster.name} says neither gpus_per_node nor processes_per_node: add one to "
                          "its file, or give --gpus-per-node")
    elements = options.array[0]
    if elements and not request.shared:
        raise ConfigError("--array shares the work of tokenization, or of convert --list FILE; this is one job: leave "
                          "it out")
    if elements and options.nodes > 1:
        raise ConfigError(f"--array {elements} asks for elements of one node each: leave --nodes out")
    if options.chain > 1 and elements:
        raise ConfigError("--chain and --array exclude each other: elements that end early are requeued, or submit "
                          "again later, which takes up the work that is left")
    if request.alone and options.nodes > 1:
        raise ConfigError(f"this is one process, but --nodes asks for {options.nodes}: leave it out")
    time_limit = options.time or cluster.time_limit
    if cluster.time_limit and seconds_of(time_limit) > seconds_of(cluster.time_limit):
        raise ConfigError(f"--time {time_limit} is longer than the longest of cluster {cluster.name}, time_limit="
                          f"{cluster.time_limit}: ask for less; a job that is not done goes on in its next start")
    if time_limit and seconds_of(time_limit) <= cluster.signal_seconds + STARTING_SECONDS:
        raise ConfigError(f"a time limit of {time_limit} leaves no time to train before the job is asked to stop, "
                          f"signal_seconds={cluster.signal_seconds} before its end: ask for more, or lower "
                          "signal_seconds in the cluster file")
    if options.exclude_failed_nodes and not cluster.requeue and options.chain == 1:
        raise ConfigError(f"--exclude-failed-nodes is for jobs that go back into the queue, but the cluster "
                          f"{cluster.name} has requeue: false: submit a --chain, or leave it out")
    container = cluster.container
    if options.container:
        if container.runtime == "none":
            raise ConfigError(f"--container {options.container}, but the cluster {cluster.name} has no "
                              "container.runtime: set pyxis or apptainer in its file")
        container = dataclasses.replace(container, image=options.container)
        cluster = dataclasses.replace(cluster, container=container)
    parent = Path(options.records).absolute() if options.records else _records_parent(request.run, request.kind)
    records, working = next_folder(parent), Path.cwd()
    if ":" in str(records):
        raise ConfigError(f"the records of the job would lie in {records}, but a path with a colon cannot be searched "
                          "for the code to run: give another output, or --records FOLDER")
    # a process of tokenization has workers of its own, and takes a whole node
    processes = 1 if request.alone else shares
    return Job(
        kind=request.kind, name=_job_name(options.name or f"{request.kind}-{Path(request.run).name}"), cluster=cluster,
        run=request.run, records=records, working_folder=working, command=request.command(records),
        nodes=options.nodes, processes_per_node=processes, gpus_per_node=gpus,
        cpus_per_node=cluster.cpus_per_process * shares,
        time_limit=time_limit, partition=options.partition or cluster.partition,
        account=options.account or cluster.account,
        python=sys.executable if container.runtime == "none" else container.python,
        mounts=() if container.runtime == "none" else mounts_of(
            request, records, working, (*container.mounts, *filter(None, [cluster.scratch])), container.runtime),
        # where processes have to meet; a worker of tokenization fails alone, and soon
        config=records / CONFIG if request.kind in ("train", "evaluate") and cluster.preflight and not
        options.no_preflight else None,
        array=elements, at_once=options.array[1], chain=options.chain, start_limit=options.start_limit,
        exclude_failed=options.exclude_failed_nodes, torchrun=options.torchrun, sbatch=tuple(options.sbatch))


def mounts_of(request: Request, records: Path, working: Path, site: tuple[str, ...], runtime: str) -> tuple[str, ...]:
    """What a container must see, each folder once and none inside another: the site's mounts, the working folder, the
    output, and every path that the command names."""
    named = [*map(Path, request.paths()), records.parent.parent, working]
    if "://" not in request.run:
        named.append(Path(request.run).parent)
    # what a symbolic link leads to has to be there, too
    folders = {path.parent if path.is_file() else path for each in named for path in (each, each.resolve())}
    found = [*site, *sorted(map(str, folders), key=len)]
    kept: list[str] = []
    for mount in found:
        if not any(mount == other or mount.startswith(f"{other.rstrip('/')}/") for other in kept if ":" not in other):
            kept.append(mount)
    meaning, words = ",\n", "commas, colons and line breaks"
    if runtime == "pyxis":  # which writes them as lines of an fstab, for enroot
        meaning, words = f"{meaning} \t$\\#", f"{words}, with pyxis blanks, $, # and backslashes, too,"
    for mount in kept:
        if any(character in mount for character in meaning) or (":" in mount and mount not in site) or mount == "/":
            raise ConfigError(f"{mount!r} cannot be mounted into a container: the root would hide the image, and "
                              f"{words} mean something else there; use another folder")
    return tuple(kept)


def try_script(script: str) -> int:
    """Let sbatch judge the script where it is there; 0 where it would take it."""
    if shutil.which("sbatch") is None:
        print("the configuration is legal; there is no sbatch here to try the script", file=sys.stderr)
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True, check=False,
                              env=_environment())
    print((done.stderr + done.stdout).strip(), file=sys.stderr)
    return 0 if done.returncode == 0 else EXIT_FAILED


def submit(job: Job, script: str, files: Mapping[str, str]) -> list[str]:
    """Slurm's numbers of the submitted jobs. UserError where sbatch refuses; the records stay to look at."""
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on PATH: submit from a login node of the cluster, or look at the script "
                        "with --print")
    refuse_second(job)
    write_submission(job, script, files)
    numbers: list[str] = []
    for _ in range(job.chain):
        # on all before: where one has done the work, the rest is dropped, and a dropped job counts as one that failed
        after = [f"--dependency=afternotok:{':'.join(numbers)}", "--kill-on-invalid-dep=yes"] if numbers else []
        done = subprocess.run(["sbatch", "--parsable", *after, str(job.records / SCRIPT)], capture_output=True,
                              text=True, check=False, env=_environment())
        if done.returncode:
            raise UserError(f"{_refusal(job, done.stderr.strip())}"
                            + (f"; {len(numbers)} jobs of the chain are submitted: {' '.join(numbers)}" if numbers else
                               f"; what it got is {job.records / SCRIPT}"))
        numbers.append(_number_of(done.stdout, job))
        append_line(job.records / JOB_IDS, numbers[-1])
    log.info("job %s: %d processes on %d nodes; look at it with `grn-scale slurm status %s`", " ".join(numbers),
             job.processes, job.nodes, job.run)
    print(" ".join(numbers))
    return numbers


def _refusal(job: Job, said: str) -> str:
    if "timed out" in said.lower():
        return (f"sbatch got no answer ({said}), and Slurm may have the job all the same: look with `squeue --me "
                f"--name={job.name}` before you submit again; `grn-scale slurm cancel {job.run}` stops it")
    return f"sbatch refused the job: {said}"


def _number_of(said: str, job: Job) -> str:
    """The job's number in what sbatch printed, behind what a site's own sbatch may say. UserError where it has none."""
    numbers = [line.partition(";")[0] for line in said.splitlines() if _PARSABLE.fullmatch(line)]
    if not numbers:
        raise UserError(f"sbatch took the job but gave no number: {said.strip()!r}; look for it with `squeue --me "
                        f"--name={job.name}`")
    return numbers[-1]


def _environment() -> dict[str, str]:
    """This process's, without what would outrank the script, or belongs to a job that we are in."""
    return {name: value for name, value in os.environ.items()
            if name == "SLURM_CONF" or not name.startswith(("SBATCH_", "SLURM_", "SRUN_"))}


def refuse_second(job: Job) -> None:
    """UserError where an earlier submission trains into the same run: one job at a time does."""
    if job.kind != "train" or not job.records.parent.is_dir():
        return
    for earlier in numbered(job.records.parent):
        queue = ask(Submission.read(earlier).job_ids) if (earlier / SUBMISSION).is_file() else Queue()
        if queue.problem:
            raise UserError(f"whether an earlier job still trains into {job.run} cannot be told: {queue.problem}; "
                            "submit again when Slurm answers")
        active = queue.active
        if active:
            raise UserError(f"job {active[0].id} ({active[0].state}) trains into {job.run}: cancel it first (grn-scale "
                            f"slurm cancel {job.run}), or give another output")


def seconds_of(limit: str) -> int:
    """Seconds of a time limit as Slurm writes them."""
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _hint(parser: CommandParser, arguments: list[str]) -> str:
    """Where an option that was left for the command looks like a mistyped one of the job."""
    near = (difflib.get_close_matches(argument.partition("=")[0], parser.long_options, n=1, cutoff=0.8)
            for argument in arguments if argument.startswith("--"))
    return next((f"; the job has {found[0]}" for found in near if found), "")


def _cluster_file(options: argparse.Namespace) -> str:
    name = options.cluster or os.environ.get(CLUSTER_VARIABLE, "")
    if not name:
        raise ConfigError(f"which cluster? Give --cluster FILE, or set {CLUSTER_VARIABLE} once; configs/clusters/ has "
                          "examples of ten lines")
    return name


def _records_parent(run: str, kind: str) -> Path:
    """RUN/slurm; beside the output of tokenization and conversion, which is theirs alone."""
    if "://" in run:
        raise ConfigError(f"output is {run}, but logs and records of a job are files: give --records FOLDER")
    return Path(run) / "slurm" if kind in ("train", "evaluate") else Path(f"{run}.slurm")


def _job_name(text: str) -> str:
    return _NOT_IN_NAMES.sub("-", text).strip("-.")[:_NAME_CHARACTERS] or "grn-scale"


def _parser(kind: str) -> CommandParser:
    parser = CommandParser(
        f"slurm {kind}", f"Run `grn-scale {kind}` as a Slurm job. Arguments that are not below are those of "
        f"`grn-scale {kind}` (see its --help). Number of\nprocesses, ports and folders are derived.",
        f"grn-scale slurm {kind} --cluster site.yaml ... --print", configured=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--print", action="store_true", help="print the batch script, and do nothing")
    what.add_argument("--dry-run", action="store_true", help="check everything that can be checked before, and let "
                      "sbatch judge the script")
    what.add_argument("--submit", action="store_true", help="check, write the job's folder and submit it")
    parser.add_argument("--wait", action="store_true", help="with --submit: stay until the job has ended, with its "
                        "exit code")
    parser.add_argument("--cluster", metavar="FILE", help=f"facts of the site (default: ${CLUSTER_VARIABLE})")
    parser.add_argument("--nodes", type=_positive, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=_count, metavar="G", help="default: what the cluster file says")
    parser.add_argument("--time", type=_time, metavar="LIMIT", help="such as 4:00:00")
    parser.add_argument("--partition", default="", metavar="NAME")
    parser.add_argument("--account", default="", metavar="NAME")
    parser.add_argument("--container", default="", metavar="IMAGE", help="another image than the cluster file's")
    parser.add_argument("--name", default="", help="of the job (default: from the output folder)")
    parser.add_argument("--records", metavar="FOLDER", help="where the job's records go (default: "
                        "OUTPUT/slurm; OUTPUT.slurm of tokenize and convert)")
    parser.add_argument("--array", type=_array_size, default=(0, 0), metavar="N[%M]", help="tokenize, convert --list: "
                        "N jobs of a node each that share the work, M at a time; more may be submitted later")
    parser.add_argument("--sbatch", type=_option, action="append", default=[], metavar="OPTION=VALUE",
                        help="a further option of sbatch, such as reservation=NAME; may be repeated")
    parser.add_argument("--chain", type=_positive, default=1, metavar="N", help="submit N jobs of which each goes on "
                        "where the one before ended, for sites without requeue")
    parser.add_argument("--start-limit", type=_positive, default=3, metavar="N", help="stop after so many starts in a "
                        "row that crashed without progress (default: 3)")
    parser.add_argument("--exclude-failed-nodes", action="store_true", help="go back into the queue without the "
                        "nodes that fail the preflight")
    parser.add_argument("--no-preflight", action="store_true", help="start without looking at the nodes before")
    parser.add_argument("--torchrun", action="store_true", help="one torchrun a node starts the processes, not srun")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, 0 or more")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _array_size(text: str) -> tuple[int, int]:
    """Number of elements, and how many may run at a time (0: all)."""
    count, percent, at_once = text.partition("%")
    return _positive(count), _positive(at_once) if percent else 0


def _option(text: str) -> str:
    if not OPTION.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of the {OPTION_FORM}")
    return text


def _time(text: str) -> str:
    if not TIME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no time limit: write 90 (minutes), 12:00:00 or 2-00:00:00")
    return text

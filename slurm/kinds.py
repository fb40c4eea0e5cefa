"""What each kind of job runs, and what must hold on the login node before it is submitted.

A command is parsed by its own program here, so that what it would refuse is refused now. The job gets the resolved
configuration, not the arguments that made it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.command_line import config_yaml
from grn_scale.config.check import check_output, check_set
from grn_scale.config.load import load_config, to_dict
from grn_scale.errors import ConfigError, UserError
from grn_scale.slurm.records import CONFIG

if TYPE_CHECKING:
    from grn_scale.slurm.script import Job

log = logging.getLogger("grn_scale")
_LIST = "conversions.txt"
_LONGEST_PATH = 4096
_MOST_FOLDERS = 16
"""Of clips that a container gets to see one by one; of more, what holds them."""


@dataclass(frozen=True)
class Request:
    """A command that was read and makes sense by itself."""

    kind: str
    run: str
    """Where it writes: absolute path or URL."""
    files: Mapping[str, str]
    """Name -> text of what the command reads in the folder of the submission: its resolved configuration, its list."""
    paths: Callable[[], Iterable[str]]
    """Files and folders that it reads, absolute, which a container must see."""
    command: Callable[[Path], tuple[str, ...]]
    """Arguments of grn-scale, given the folder of the submission."""
    check: Callable[[Job], None]
    """Raises UserError where it could not run as this job; looks at files and writes nothing."""
    shared: bool = False
    """Whether several jobs may do its work together."""
    alone: bool = False
    """One process, also on a node of many GPUs: it has workers of its own, or none to share with."""


def read_request(kind: str, argv: list[str]) -> Request:
    """What `argv` asks of the command `kind`; ConfigError where that refuses it."""
    return _KINDS[kind](argv)


def _train(argv: list[str]) -> Request:
    from grn_scale.pretrain import train

    config, options = train.command_parser("auto").parse_command(argv)
    check_set(config, "output")
    if options.resume not in ("none", "auto", "must"):
        raise ConfigError(f"--resume {options.resume}: a job that comes back must find its own newest checkpoint; to "
                          "start from the weights of another run set init.from, to go on from a checkpoint of this run "
                          "move the later step folders away, and leave --resume out")

    def check(job: Job) -> None:
        train.check_before_start(config, options.resume, job.processes)
        _check_memory(config, job)
        _check_space(config)
        _check_resume(options.resume, Path(config.output))

    # a start that is not the first one goes on, whatever was asked of the first
    return _of_config("train", config, check, "--resume", "auto")


def _check_memory(config: Any, job: Job) -> None:
    """Tell what the fullest GPU will hold, where the cluster file names the GPUs; UserError where not even the tensors
    fit. What is beside tensors is assumed, so a plan that is a little too large only warns."""
    from grn_scale.config.schema import ModelConfig
    from grn_scale.planning.grn_machine import find_machine
    from grn_scale.tools.plan_document import budgets, remedies

    if not job.cluster.gpu or not job.gpus_per_node or not isinstance(config.model, ModelConfig):
        return
    machine = find_machine(config, job.cluster.gpu, job.nodes, job.gpus_per_node, job.cluster.network)
    stages = budgets(config, machine)
    tensors, most = max(memory.bytes["peak"] for memory, _ in stages), max(held.most for _, held in stages)
    if most <= machine.limit:
        log.info("memory planned: %.1f of %.1f GB on the fullest GPU", most / 1e9, machine.memory / 1e9)
        return
    nearest = remedies(config, machine)["nearest"]
    near = (f"nearest settings that fit: {' '.join(nearest[0]['settings'])}" if nearest else
            f"no layout on these GPUs fits: take more nodes, or a data.token_budget below {config.data.token_budget}")
    remedy = (f"{near} (all: grn-scale plan --search --gpu {job.cluster.gpu} --gpus-per-node {job.gpus_per_node} "
              f"--nodes {job.nodes} with this configuration)")
    if tensors > machine.memory:
        raise UserError(f"memory: the tensors of a process would take {tensors / 1e9:.1f} GB, but a {job.cluster.gpu} "
                        f"has {machine.memory / 1e9:.1f} GB; {remedy}")
    log.warning("memory planned: %.1f of %.1f GB on the fullest GPU; %s", most / 1e9, machine.memory / 1e9, remedy)


def _check_space(config: Any) -> None:
    """UserError where the checkpoints to come do not fit what is free now."""
    from grn_scale.slurm.preflight_files import checkpoint_bytes, checkpoints_to_come

    output = Path(config.output).absolute()
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    size, count, free = checkpoint_bytes(config), checkpoints_to_come(config), shutil.disk_usage(there).free
    if free < size * count:
        raise UserError(f"output: {free / 2**30:.1f} GiB are free in {there}, but {count} more checkpoints of "
                        f"{size / 2**30:.1f} GiB are to come: free space, lower train.keep_last, or write elsewhere")


def _check_resume(resume: str, run: Path) -> None:
    from grn_scale.checkpoint.checkpoint import resolve_resume
    from grn_scale.checkpoint.layout import scan

    if resume == "none":
        resolve_resume(resume, run)
    if resume == "must" and not any(found.sealed and not found.problem for found in scan(run)):
        raise ConfigError(f"--resume must, but {run} has no complete checkpoint: leave it out to start afresh")


def _tokenize(argv: list[str]) -> Request:
    from grn_scale.data_pipeline import tokenize_clips

    config, options = tokenize_clips.parse_command(argv)
    check_set(config, "output")

    def check(job: Job) -> None:
        tokenize_clips.check_before_start(config)
        if not Path(config.data.manifest).is_file():
            raise ConfigError(f"data.manifest: there is no file {config.data.manifest}")

    flags = ["--retry-quarantined"] * options.retry_quarantined + ["--accept-environment"] * options.accept_environment
    request = _of_config("tokenize", config, check, *flags)
    return dataclasses.replace(request, paths=lambda: [*request.paths(), *_clip_folders(Path(config.data.manifest))])


def _clip_folders(manifest: Path) -> set[str]:
    """Folders there that hold the clips of a manifest, judged by a sample of its lines."""
    from grn_scale.data_pipeline.manifest_sample import sample_manifest

    clips = sample_manifest(manifest.absolute())[0] if manifest.is_file() else []
    folders = {clip.path.parent for clip in clips if clip}
    while len(folders) > _MOST_FOLDERS and (deepest := max(len(folder.parts) for folder in folders)) > 2:
        folders = {folder.parent if len(folder.parts) == deepest else folder for folder in folders}
    return {str(folder) for folder in folders if folder.is_dir()}


def _evaluate(argv: list[str]) -> Request:
    from grn_scale.config.class_schema import SCHEMAS
    from grn_scale.data.mixture import Mixture
    from grn_scale.evaluation.command import ALONE, command_parser
    from grn_scale.sampling.source import open_source

    parser = command_parser()
    options, flags = parser.parse_unresolved(argv), parser.own_arguments(argv)
    source = open_source(options.run) if options.run else None
    config = (source.run_config(options.overrides, options.config) if source
              else load_config(options.config, options.overrides, SCHEMAS))
    check_set(config, "output")
    def check(job: Job) -> None:
        check_output(config.output)
        if options.held_out:
            Mixture.open(config.data)

    request = _of_config("evaluate", config, check, *flags, options=options)
    return dataclasses.replace(request, alone=any(getattr(options, name) for name in ALONE))


def _convert(argv: list[str]) -> Request:
    from grn_scale.convert.command import command_parser

    if any(argument.partition("=")[0] == "--list" for argument in argv):
        return _convert_many(argv)
    options = command_parser().parse_options(argv)

    def check(job: Job) -> None:
        if job.processes > 1:
            raise ConfigError(f"convert is one process, but {job.processes} were asked for: leave --nodes out")
        if not Path(options.input).exists():
            raise ConfigError(f"--input: there is no {options.input}")
        if Path(options.output).exists():
            raise ConfigError(f"--output: {options.output} exists; convert writes what is not there yet")

    line = shlex.join(argv)
    if "\n" in line:
        raise ConfigError("a line break in an argument of convert cannot be kept for a job: use another name")
    # as a list of one: a start after a kill then removes what the one before had begun
    return Request("convert", _where(options.output), {_LIST: f"{line}\n"}, lambda: _paths(None, options),
                   lambda folder: ("convert", "--list", str(folder / _LIST)), check, alone=True)


def _convert_many(argv: list[str]) -> Request:
    from grn_scale.convert.command import command_parser, conversions, list_parser

    options = list_parser().parse_options(argv)
    lines = conversions(options.list)

    def check(job: Job) -> None:
        for line in lines:
            if not line.request.input.exists():
                raise ConfigError(f"{options.list}:{line.number}: there is no {line.request.input}")

    def paths() -> Iterator[str]:
        yield _where(options.list)
        for line in lines:
            output = line.request.output.absolute()
            yield str(next(folder for folder in output.parents if folder.exists()))
            yield from _paths(None, command_parser().parse_options(line.arguments))

    return Request("convert", _where(options.list), {}, paths, lambda folder: ("convert", *argv), check, shared=True,
                   alone=True)


def _of_config(kind: str, config: Any, check: Callable[[Job], None], *flags: str, options: Any = None) -> Request:
    return Request(kind, _where(config.output), {CONFIG: config_yaml(config)}, lambda: _paths(config, options),
                   lambda folder: (kind, "--config", str(folder / CONFIG), *flags), check,
                   shared=kind == "tokenize", alone=kind == "tokenize")


def _where(output: str) -> str:
    return output if "://" in output else str(Path(output).absolute())


def _paths(config: Any, options: Any) -> Iterator[str]:
    """Absolute paths of everything that exists under a name which the configuration or the options hold."""
    values = [*_texts(to_dict(config) if dataclasses.is_dataclass(config) else {}),
              *_texts(vars(options) if options is not None else {})]
    for value in values:
        if value and len(value) < _LONGEST_PATH and "\n" not in value and "://" not in value and os.path.exists(value):
            yield str(Path(value).absolute())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


_KINDS: dict[str, Callable[[list[str]], Request]] = {
    "train": _train, "tokenize": _tokenize, "convert": _convert, "evaluate": _evaluate}

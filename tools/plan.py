"""grn-scale plan: what a run needs and how fast it will be, before anything is reserved for it.

    grn-scale plan --config configs/runs/grn_8b.yaml --cluster configs/clusters/bare_h100.yaml --nodes 32 --search
    grn-scale plan validate --cases FILE    # the model behind it against published runs
    grn-scale plan simulate --help          # stragglers, packs of different length, failures
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grn_scale.command_line import CommandParser, nearest, run
from grn_scale.config.check import check_layout
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.cluster import Cluster
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import EXIT_FAILED, ConfigError
from grn_scale.planning.grn_machine import Machine, find_machine
from grn_scale.tools.plan_dense import DenseMachine, DenseRun, dense_document, dense_ranked, dense_remedies
from grn_scale.tools.plan_document import document, remedies, show
from grn_scale.tools.plan_search import Ranked, ranked, search_document, show_search

if TYPE_CHECKING:
    from argparse import Namespace

ACTIONS = {"validate": "grn_scale.tools.plan_validate", "simulate": "grn_scale.tools.plan_simulate"}
"""Subcommand -> the module whose `main` it is."""


def command_parser(schema: type | tuple[type, ...] = SCHEMAS) -> CommandParser:
    parser = CommandParser(
        "plan", "Say what each rank of a run will hold, whether that fits its GPU, how fast a step will be and what it "
        "costs; on a login node, without torch.\n\nplan validate compares the model behind it with published runs, "
        "plan simulate replays stragglers and failures; each has --help.",
        "grn-scale plan --config configs/runs/grn_8b.yaml --cluster configs/clusters/bare_h100.yaml --nodes 32",
        schema=schema, json=True)
    parser.add_argument("--dense", metavar="FILE", help="in place of --config: the figures of another dense "
                        "transformer, as in configs/planner/llama3_8b.yaml; its keys can be set, as tp=4")
    parser.add_argument("--cluster", metavar="FILE", help="facts of the site: its GPUs, and how many a node has")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the job (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="in place of the cluster file's")
    parser.add_argument("--gpu", metavar="NAME", help="in place of the cluster file's: H100, A100, ... or "
                        "(not with --dense) a file that `grn-scale bench gpu --hardware FILE.yaml` measured")
    parser.add_argument("--network", type=float, metavar="GBITS", help="Gbit/s of the nodes' network for each GPU, in "
                        "place of the cluster file's network_gbits")
    parser.add_argument("--tokens", type=float, metavar="T", help="say how long training on so many tokens takes")
    parser.add_argument("--price", type=float, metavar="P", help="of a GPU for an hour, in place of the cluster file's")
    parser.add_argument("--search", action="store_true", help="rank the legal layouts that fit by throughput")
    parser.add_argument("--exact", action="store_true", help="compare memory with a dry run of every kind of rank "
                        "(needs torch, megatron-core and deepspeed; seconds for each pipeline stage)")
    return parser


def gpus_of(options: Namespace) -> tuple[str, int, int, float | None]:
    """(name of the GPU, nodes, GPUs of a node, bytes a second of a GPU to other nodes) that the options name, as
    `find_machine` takes them; ConfigError, with what to give, where they do not."""
    cluster = Cluster.load(options.cluster) if options.cluster else None
    for name, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node),
                        ("--tokens", options.tokens), ("--price", options.price),
                        ("--network", options.network)):
        least = 0 if name == "--price" else 1
        if value is not None and not value >= least:
            raise ConfigError(f"{name} is {value}, but must be at least {least}")
    gpu = options.gpu or (cluster.gpu if cluster else "")
    per_node = options.gpus_per_node or (cluster.gpus_per_node if cluster else 0)
    if not gpu:
        raise ConfigError("which GPU? " + (f"{options.cluster} has no `gpu:`: write it there, such as gpu: H100, or "
                                           "give --gpu H100" if cluster else
                                           "Give --cluster FILE, or --gpu H100 and --gpus-per-node 8"))
    if not per_node:
        known = f"{options.cluster} has gpus_per_node: 0; " if cluster else ""
        raise ConfigError(f"how many GPUs has a node? {known}give --gpus-per-node 8")
    network = options.network / 8 * 1e9 if options.network else cluster.network if cluster else None
    return gpu, options.nodes, per_node, network


def check_plan(config: Any, world_size: int) -> Config:
    """The configuration, if it is one of a text/video model with a legal layout; ConfigError otherwise."""
    if not isinstance(config.model, ModelConfig):
        raise ConfigError("the model is a class-to-image model, which every process holds whole: there is no layout to "
                          "plan; name a text/video model, e.g. model=configs/model/grn_2b.yaml")
    with _search_hint():
        check_layout(config, world_size)
    return config


@contextmanager
def _search_hint() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; --search lists the layouts that are legal here and fit") from error


def plan(argv: list[str]) -> int:
    """Exit code of `grn-scale plan argv...`: 1 where the layout, or with --search every layout, does not fit."""
    if any(argument.partition("=")[0] == "--dense" for argument in argv):
        return _plan_dense(argv)
    config, options = command_parser().parse_command(argv)
    machine = find_machine(config, *gpus_of(options))
    if options.exact:
        from grn_scale.parallel.dry_run import check_dry_run

        check_dry_run(config, machine.gpus)
    price = _price(options)
    if options.search:
        begin = time.perf_counter()
        found = ranked(config, machine, options.tokens, price)
        return _search(options, machine, machine.gpu.name, found, lambda: remedies(config, machine), begin)
    config = check_plan(config, machine.gpus)
    result = document(config, machine, options.tokens, price)
    if options.exact:
        result["exact"] = _exact(config, machine)
    return _print(options, result)


def _plan_dense(argv: list[str]) -> int:
    options = command_parser(DenseRun).parse_unresolved(argv)
    for name, given in (("--config", options.config), ("--exact", options.exact)):
        if given:
            raise ConfigError(f"{name} is for a GRN model, --dense for another one: give one of them")
    try:
        run = load_config(options.dense, options.overrides, DenseRun)
    except ConfigError as error:
        raise ConfigError(f"--dense: {str(error).removeprefix('--config: ')}") from error
    machine, price = DenseMachine.find(run, *gpus_of(options)), _price(options)
    if options.search:
        begin = time.perf_counter()
        found = dense_ranked(run, machine, options.tokens, price)
        return _search(options, machine, machine.machine.gpu.name, found, lambda: dense_remedies(run, machine), begin)
    with _search_hint():
        run.layout(machine.gpus)
    return _print(options, dense_document(run, machine, options.tokens, price))


def _search(options: Namespace, machine: Machine | DenseMachine, gpu: str, found: tuple[list[Ranked], int],
            nearest_layouts: Callable[[], dict[str, Any]], begin: float) -> int:
    sizes = {"limit_bytes": machine.limit, "gpu_bytes": machine.memory}
    result = search_document(gpu, machine.gpus, sizes, found, nearest_layouts, time.perf_counter() - begin)
    print(json.dumps(result)) if options.json else show_search(result)
    return 0 if result["layouts"] else EXIT_FAILED


def _print(options: Namespace, result: dict[str, Any]) -> int:
    print(json.dumps(result)) if options.json else show(result)
    whole = not result.get("exact", {}).get("differences")
    return 0 if result["verdict"]["fits"] and whole else EXIT_FAILED


def _price(options: Namespace) -> float | None:
    if options.price is not None:
        return options.price
    return (Cluster.load(options.cluster).price_per_gpu_hour or None) if options.cluster else None


def _exact(config: Config, machine: Machine) -> dict[str, Any]:
    """The dry run of every stage, and what the planner says of the same operations, as plain values."""
    from rich.console import Console
    from rich.progress import Progress

    from grn_scale.tools.plan_exact import compare, exact_document

    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pipeline stages", total=config.parallel.pipeline)
        tried, planned = compare(config, machine.gpus, lambda: progress.advance(task))
    return exact_document(tried, planned, time.perf_counter() - begin)


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale plan argv...`."""
    if argv and argv[0] in ACTIONS:
        return importlib.import_module(ACTIONS[argv[0]]).main(argv[1:])
    if argv and argv[0].isalpha():
        raise ConfigError(f"grn-scale plan {argv[0]}: {nearest(argv[0], ACTIONS)} (a plan itself takes options "
                          "alone: grn-scale plan --help)")
    return plan(argv)


if __name__ == "__main__":
    sys.exit(run(main))

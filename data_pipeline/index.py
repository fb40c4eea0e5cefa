"""grn-scale index: look at what training will read, and keep datasets in order.

    grn-scale index plan --dataset tokens/ --world-size 8 --steps 0:3 --config configs/runs/demo.yaml
    grn-scale index merge tokens-a/ tokens-b/ --output tokens/
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from grn_scale.command_line import CommandParser, choose, run
from grn_scale.config.check import check_layout
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.schema import Config
from grn_scale.data.loader import check_step_size
from grn_scale.data.mixture import Mixture
from grn_scale.data.packing import Cost, assign
from grn_scale.data.plan import Plan
from grn_scale.data.ramp import packs_of_step
from grn_scale.data_pipeline.index_build import run_build
from grn_scale.data_pipeline.index_gc import run_gc
from grn_scale.data_pipeline.index_merge import run_merge
from grn_scale.data_pipeline.index_repair import run_repair
from grn_scale.errors import ConfigError
from grn_scale.parallel.dims import Coordinate, Dims


def steps_of_plan(plan: Plan, packs_of: Callable[[int], int], ranks: int, cost: Cost,
                  steps: range) -> Iterator[dict[str, Any]]:
    """For each step its global batch as plain values: samples, lengths and cost (training FLOPs) by data-parallel
    rank and pack, in micro-batch order; fill of the packs that are not empty; cost of the busiest rank over the mean.

    packs_of: packs that a step takes.
    """
    state = plan.state_at(steps.start, packs_of, functools.partial(_tracked, windows=plan.windows))
    for step in steps:
        packs, after = plan.next_step(state, packs_of(step))
        costs = [cost.of(draw.tokens for draw in pack.draws) for pack in packs]
        by_rank = assign(costs, ranks)
        loads = [sum(costs[i] for i in mine) for mine in by_rank]
        full = [pack.tokens for pack in packs if pack.draws]
        yield {
            "step": step, "epoch": state.epoch, "packs": len(packs),
            "fill": sum(full) / (len(full) * plan.token_budget),
            "max_over_mean_cost": max(loads) * ranks / sum(loads),
            "ranks": [{"rank": rank, "cost": loads[rank], "packs": [
                {"position": packs[i].position, "tokens": packs[i].tokens, "cost": costs[i], "samples": [
                    {"draw": draw.index, "id": draw.key, "dataset": draw.dataset, "task": draw.task,
                     "tokens": draw.tokens, "text_tokens": draw.text_tokens} for draw in packs[i].draws]}
                for i in mine]} for rank, mine in enumerate(by_rank)],
        }
        state = after


def plan_document(mixture: Mixture, config: Config, world_size: int, steps: range) -> dict[str, Any]:
    """What `index plan` prints; `processes` lists the global ranks that read what a data-parallel rank reads.

    `expected_visits` is the size of an epoch, held-out samples counted in. Raises ConfigError where the configuration
    does not fit the world size or the index.
    """
    check_layout(config, world_size)
    dims = Dims.of_world(world_size, config.parallel.tensor, config.parallel.pipeline, config.parallel.context)
    data, model = config.data, config.model
    plan = Plan.of(mixture, data, config.seed)
    check_step_size(plan, data.packs_per_step)
    cost = Cost.of_shape(model.num_layers, model.hidden_size, model.ffn_hidden_size)
    return {"snapshot": mixture.snapshot, "settings": plan.settings, "token_budget": data.token_budget,
            "packs_per_step": data.packs_per_step, "samples": mixture.samples,
            "expected_visits": mixture.expected_visits,
            "datasets": [{"dataset": mixture.name(number), "samples": dataset.info.samples,
                          "visits_of_an_image": visits.images, "visits_of_a_video": visits.videos}
                         for number, (dataset, visits) in enumerate(zip(mixture.datasets, mixture.visits))],
            "world_size": world_size, "data_parallel_size": dims.data,
            "processes": [dims.pack_group(dims.rank(Coordinate(0, 0, rank, 0))) for rank in range(dims.data)],
            "steps": list(steps_of_plan(plan, functools.partial(packs_of_step, data), dims.data, cost, steps))}


def _tracked(walk: Iterator, windows: int) -> Iterable:
    from rich.console import Console
    from rich.progress import track

    return track(walk, "counting packs", total=windows, console=Console(stderr=True), transient=True)


def render(document: dict[str, Any]) -> str:
    """The document as text for people."""
    lines = [f"{document['samples']} samples, about {document['expected_visits']:.0f} visits an epoch; "
             f"{document['packs_per_step']} packs of {document['token_budget']} tokens a step on "
             f"{document['data_parallel_size']} data-parallel ranks"]
    lines += [f"dataset {number}  {part['dataset']}  {part['samples']} samples, visits of an image "
              f"{part['visits_of_an_image']:.4g}, of a video {part['visits_of_a_video']:.4g}"
              for number, part in enumerate(document["datasets"])]
    for step in document["steps"]:
        lines.append(f"step {step['step']}  epoch {step['epoch']}  {step['packs']} packs  fill {step['fill']:.1%}  "
                     f"busiest rank / mean cost {step['max_over_mean_cost']:.3f}")
        for rank in step["ranks"]:
            for pack in rank["packs"]:
                ids = " ".join(f"{s['dataset']}/{s['id']}:{s['tokens']}" for s in pack["samples"]) or "(empty)"
                lines.append(f"  rank {rank['rank']}  pack {pack['position']}  {pack['tokens']} tokens  "
                             f"{pack['cost']:.3g} FLOPs  {ids}")
    return "\n".join(lines)


def _steps(text: str) -> range:
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or int(first) >= int(last):
        raise ConfigError(f"--steps is {text!r}, but must be A:B with A < B (steps A to B - 1, counted from 0)")
    return range(int(first), int(last))


def show_plan(argv: list[str]) -> int:
    """Exit code of `grn-scale index plan argv...`; prints the plan."""
    parser = CommandParser(
        "index plan", "Show which samples each rank reads at each step, without reading data: dataset/sample:tokens by "
        "rank and pack, in the order they are run.",
        "grn-scale index plan --dataset tokens/ --world-size 8 --steps 0:3 data.packs_per_step=16", json=True,
        schema=SCHEMAS)
    parser.add_argument("--dataset", metavar="DIR", help="folder of token shards (default: those of the data section)")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    parser.add_argument("--steps", default="0:1", metavar="A:B", help="steps A to B - 1, counted from 0 (default: 0:1)")
    config, options = parser.parse_command(argv)
    steps = _steps(options.steps)
    data = replace(config.data, dataset=options.dataset, mixture=()) if options.dataset else config.data
    config = replace(config, data=data)
    document = plan_document(Mixture.open(data), config, options.world_size, steps)
    print(json.dumps(document) if options.json else render(document))
    return 0


def main(argv: list[str]) -> int:
    """Exit code. The result goes to stdout; raises UserError."""
    return choose("index", argv, {"build": run_build, "plan": show_plan, "repair": run_repair, "merge": run_merge,
                                  "gc": run_gc}, "Look at what training will read, and keep datasets in order.\n\n"
                  "  build    write the index anew from what tokenize has finished\n"
                  "  plan     show which samples each rank reads at each step\n"
                  "  repair   have what is damaged made again, and mend the index where the tars are whole\n"
                  "  merge    make one dataset of several\n"
                  "  gc       remove older snapshots, and what nothing needs any more")


if __name__ == "__main__":
    sys.exit(run(main))

"""grn-scale plan simulate: steps and failures of a large job, replayed before it is launched.

Everything that takes time is given: measure it on a small job (docs/planner_simulation.md says where to read it).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError
from grn_scale.keyed import hash64, key64
from grn_scale.planning.failures import Failures, job_mtbf
from grn_scale.planning.pictures import picture_format
from grn_scale.planning.schedule import Schedule
from grn_scale.planning.simulation import Job, Slowness, Steps, simulate, timeline
from grn_scale.planning.simulation_report import MOST_TASKS, plot, show

log = logging.getLogger("grn_scale.plan")

MOST_VALUES = 1 << 27
"""Costs of packs and speeds of ranks that are held at once: a gigabyte."""
MOST_TRIALS = 1_000_000
PLACED_TOGETHER = 256
"""Replicas whose packs are placed together: placing many more takes minutes, and makes them no more even."""


def number(text: str) -> float:
    """A finite number; argparse reports the ValueError."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def command_parser() -> CommandParser:
    parser = CommandParser(
        "plan simulate", "Replay the steps of a large job, with packs of different cost and slow ranks, and its "
        "failures: step time, idle time, goodput, and how often to save.",
        "grn-scale plan simulate --ranks 16384 --tensor 8 --pipeline 16 --virtual 2 --micro-batches 64 \\\n"
        "    --forward-seconds 0.05 --stragglers 0.001 --slowdown 1.3 --mtbf-hours-per-gpu 50000 \\\n"
        "    --checkpoint-seconds 10 --durable-seconds 120 --restart-seconds 600 --steps 100000", configured=False,
        json=True)
    layout = parser.add_argument_group("layout")
    for name, default, text in (("ranks", None, "of the job, one a GPU"), ("tensor", 1, "tensor parallel ranks"),
                                ("context", 1, "context parallel ranks"), ("pipeline", 1, "stages"),
                                ("virtual", 1, "chunks of a stage (interleaved 1F1B); 1 is 1F1B"),
                                ("micro-batches", None, "of a step, for each replica")):
        layout.add_argument(f"--{name}", type=int, required=default is None, default=default, metavar="N",
                            help=f"{text}{'' if default is None else f' (default: {default})'}")
    times = parser.add_argument_group("times of a step")
    _number(times, "forward-seconds", "forward pass of a mean micro-batch through one stage, all its chunks", None)
    _number(times, "backward-ratio", "backward pass over forward pass; 3 with full recomputation", 2.0)
    _number(times, "transfer-seconds", "of the result of a pass to the next stage", 0.0)
    times.add_argument("--overlap-transfers", action="store_true", help="stages compute while they send and receive "
                       "(megatron-core's overlap_p2p_comm, interleaved only; this package's training does not)")
    _number(times, "after-seconds", "gradient reduction that nothing hides, and optimizer", 0.0)
    packs = parser.add_argument_group("packs of different cost")
    packs.add_argument("--lengths", metavar="FILE.csv", help="clips, in columns t, h, w, text_tokens: packed and "
                       "placed as in training; without it all micro-batches cost the same")
    packs.add_argument("--token-budget", type=int, metavar="N", help="tokens of a micro-batch")
    packs.add_argument("--model", metavar="FILE.yaml", help="model configuration: what attention costs beside the rest")
    ranks = parser.add_argument_group("ranks of different speed")
    _number(ranks, "stragglers", "share of the ranks that are slow", 0.0)
    _number(ranks, "slowdown", "time of a slow rank over that of another", 1.0)
    _number(ranks, "jitter", "standard deviation of the logarithm of a rank's time, drawn anew in each step", 0.0)
    failures = parser.add_argument_group("failures (with a mean time between failures)")
    _number(failures, "mtbf-hours-per-gpu", "mean time between failures of one GPU", argparse.SUPPRESS)
    _number(failures, "mtbf-hours-per-node", "of one node, beside those of its GPUs", argparse.SUPPRESS)
    failures.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    _number(failures, "checkpoint-seconds", "how long a save stops the run", argparse.SUPPRESS)
    _number(failures, "durable-seconds", "from the beginning of a save until a restart can use it (default: as long as "
            "it stops the run)", argparse.SUPPRESS)
    _number(failures, "restart-seconds", "from a failure that is noticed until the run goes on", argparse.SUPPRESS)
    _number(failures, "detection-seconds", "until a failure is noticed: seconds for a process that dies, "
            "watchdog.step_seconds for a hang", 0.0)
    failures.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="judge this interval beside the best")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="length of the run: also says how long it takes")
    length.add_argument("--tokens", type=number, metavar="N", help="the same in tokens, with --token-budget")
    parser.add_argument("--replays", type=int, default=8, metavar="N", help="steps that are replayed (default: 8)")
    parser.add_argument("--trials", type=int, default=1000, metavar="N",
                        help="runs that are replayed with failures (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything drawn (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png",
                        help="picture of a step, and of goodput over the time between saves")
    return parser


def _number(group: Any, name: str, text: str, default: float | str | None) -> None:
    given = isinstance(default, float)
    group.add_argument(f"--{name}", type=number, metavar="X", required=default is None,
                       default=default if given else None, help=f"{text} (default: {default:g})" if given else text)


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options; ConfigError for those that do not go together."""
    for name in ("ranks", "tensor", "context", "gpus_per_node", "token_budget", "steps", "replays", "trials",
                 "checkpoint_every", "tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}, but must be at least 1")
    values = options.replays * options.ranks * options.micro_batches
    if values > MOST_VALUES:
        raise ConfigError(f"{options.replays} steps of {options.ranks} ranks and {options.micro_batches} micro-batches "
                          f"take too much memory: take --replays {max(1, options.replays * MOST_VALUES // values)}, or "
                          "fewer micro-batches")
    if options.trials > MOST_TRIALS:
        raise ConfigError(f"--trials is {options.trials}, but {MOST_TRIALS} at most; a thousand are plenty")
    if options.lengths and not (options.token_budget and options.model):
        raise ConfigError("--lengths needs --token-budget N, which clips are packed to, and --model FILE.yaml, which "
                          "tells what they cost (such as model/grn_2b.yaml)")
    if options.tokens and not options.token_budget:
        raise ConfigError("--tokens needs --token-budget N, the tokens of a micro-batch; or give --steps")
    if (options.stragglers > 0) != (options.slowdown != 1):
        raise ConfigError("--stragglers and --slowdown belong together: a share of the ranks, and how many times as "
                          "long they take")
    fails = options.mtbf_hours_per_gpu is not None or options.mtbf_hours_per_node is not None
    if fails and (options.checkpoint_seconds is None or options.restart_seconds is None):
        raise ConfigError("failures need --checkpoint-seconds and --restart-seconds: what a save and a restart take")
    if not fails:
        without = [name for name in ("checkpoint_seconds", "restart_seconds", "durable_seconds", "checkpoint_every")
                   if getattr(options, name) is not None]
        if without:
            raise ConfigError(f"--{without[0].replace('_', '-')} is about failures: give --mtbf-hours-per-gpu or "
                              "--mtbf-hours-per-node too")
    if options.plot:
        picture_format(options.plot)
        if not fails and options.pipeline == 1:
            raise ConfigError("--plot has nothing to show: give --pipeline of 2 or more, or --mtbf-hours-per-gpu")
    return options


def pack_costs(options: argparse.Namespace, job: Job) -> tuple[np.ndarray, float]:
    """Cost of each micro-batch over the mean [steps, replicas, micro-batches], and how full packs are.

    Clips are packed window by window, and each step takes a random choice of the packs, placed on replicas as training
    does. A pack costs its linear part whole, as padding does, and its attention.
    """
    from grn_scale.data.packing import Cost, assign, pack
    from grn_scale.perf.bench_packing import read_lengths

    budget, micro_batches = options.token_budget, job.schedule.micro_batches
    lengths = read_lengths(options.lengths)
    if lengths.max() > budget:
        raise ConfigError(f"{options.lengths}: {np.count_nonzero(lengths > budget)} of {len(lengths)} clips have more "
                          f"than --token-budget {budget} tokens, up to {lengths.max()}: raise it to that, or leave "
                          "them out")
    model = load_config(None, [f"model={options.model}"]).model
    cost = Cost.of_shape(model.num_layers, model.hidden_size, model.ffn_hidden_size)
    needed, costs, tokens = job.replicas * micro_batches, [], 0
    while len(costs) < needed:
        window = lengths[np.argsort(hash64(key64("window", options.seed, len(costs)), np.arange(len(lengths))))]
        packs = [window[items].tolist() for items in pack(window.tolist(), budget)]
        costs += [cost.linear * budget + cost.quadratic * sum(s * s for s in items) for items in packs]
        tokens += int(lengths.sum())
    placed = []
    for step in range(options.replays):
        order = np.argsort(hash64(key64("packs of a step", options.seed, step), np.arange(len(costs))))[:needed]
        replicas = []
        for first in range(0, job.replicas, PLACED_TOGETHER):
            mine = [costs[i] for i in order[first * micro_batches:(first + PLACED_TOGETHER) * micro_batches]]
            replicas += [[float(mine[i]) for i in row] for row in assign(mine, len(mine) // micro_batches)]
        placed.append(replicas)
    return np.array(placed) / np.mean(costs), tokens / (len(costs) * budget)


def step_document(job: Job, steps: Steps, even: Steps, even_ranks: Steps, tokens: float | None) -> dict[str, Any]:
    """Times of a step as plain values. even: packs and ranks alike; even_ranks: ranks alike."""
    seconds, parts = float(steps.total.mean()), steps.parts()
    return {
        "seconds": seconds, "slowest_seconds": float(steps.total.max()), "parts": parts,
        "seconds_even_packs_and_ranks": float(even.total.mean()), "seconds_even_ranks": float(even_ranks.total.mean()),
        "bubble": parts["pipeline"] / parts["work"], "bubble_closed_form": job.schedule.bubble,
        "working_share": parts["work"] / seconds, "tokens": tokens,
        "tokens_per_second": None if tokens is None else tokens / seconds,
    }


def failure_document(options: argparse.Namespace, failures: Failures, step_values: dict[str, Any],
                     run_steps: int | None) -> dict[str, Any]:
    """Goodput of the best interval, the closed forms and the one that was asked for, as plain values."""
    step = step_values["seconds"]
    least = max(1, math.ceil(failures.latency / step * (1 - 1e-12)))
    below = max(least, int(failures.best_interval() / step))
    best = max((below, below + 1), key=lambda count: failures.goodput(count * step))
    wanted = {"best": best, "Young 1974": max(least, round(failures.young_interval() / step)),
              "Daly 2006": max(least, round(failures.daly_interval() / step))}
    if options.checkpoint_every:
        wanted["--checkpoint-every"] = options.checkpoint_every
    intervals = []
    for name, count in wanted.items():
        row: dict[str, Any] = {"name": name, "steps": count, "seconds": count * step,
                               "goodput": failures.goodput(count * step)}
        if run_steps:
            work = run_steps * step
            walls = failures.replay(work, count * step, options.trials, options.seed)
            row |= {"wall_seconds": failures.expected_seconds(work, count * step),
                    "replayed_wall_seconds": float(walls.mean()),
                    "replayed_standard_error": float(walls.std(ddof=1) / math.sqrt(len(walls))) if len(walls) > 1
                    else None,
                    "replayed_p5_seconds": float(np.quantile(walls, 0.05)),
                    "replayed_p95_seconds": float(np.quantile(walls, 0.95))}
        intervals.append(row)
    return {"mtbf_seconds": failures.mtbf, "working_share": intervals[0]["goodput"] * step_values["working_share"],
            "run_steps": run_steps, "trials": options.trials if run_steps else None,
            "intervals": intervals}


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale plan simulate argv...`."""
    options = checked(command_parser().parse_options(argv))
    start_logging()
    begin = time.perf_counter()
    schedule = Schedule(options.pipeline, options.virtual, options.micro_batches)
    job = Job(schedule, options.ranks, options.tensor * options.context, options.forward_seconds,
              options.backward_ratio, options.transfer_seconds, options.overlap_transfers, options.after_seconds)
    slowness = Slowness(options.stragglers, options.slowdown, options.jitter)
    alike, no_slowness = np.ones((1, 1, options.micro_batches)), np.ones((1, 1, options.pipeline))
    costs, fill = pack_costs(options, job) if options.lengths else (alike, 1.0)
    factors = slowness.factors(job, options.replays if slowness.jitter else 1, options.seed)
    steps = simulate(job, costs, factors)
    tokens = (None if options.token_budget is None
              else job.replicas * options.micro_batches * options.token_budget * fill)
    run_steps = math.ceil(options.tokens / tokens) if options.tokens else options.steps
    document: dict[str, Any] = {
        "layout": {"ranks": job.ranks, "replicas": job.replicas, "tensor": options.tensor, "context": options.context,
                   "pipeline": options.pipeline, "virtual": options.virtual, "micro_batches": options.micro_batches},
        "replays": len(steps.total), "fill": fill, "seed": options.seed,
        "step": step_document(job, steps, simulate(job, alike, no_slowness), simulate(job, costs, no_slowness), tokens),
        "failures": None,
    }
    document["run"] = run_steps and {"steps": run_steps, "seconds": run_steps * document["step"]["seconds"]}
    failures = None
    if options.mtbf_hours_per_gpu is not None or options.mtbf_hours_per_node is not None:
        mtbf = job_mtbf(job.ranks, hours_per_gpu=options.mtbf_hours_per_gpu,
                        nodes=math.ceil(job.ranks / options.gpus_per_node), hours_per_node=options.mtbf_hours_per_node)
        failures = Failures(mtbf, options.checkpoint_seconds, options.restart_seconds, options.detection_seconds,
                            options.durable_seconds)
        document["failures"] = failure_document(options, failures, document["step"], run_steps)
    document["seconds"] = time.perf_counter() - begin
    if options.plot:
        drawn = options.pipeline > 1 and 2 * options.pipeline * options.virtual * options.micro_batches <= MOST_TASKS
        if options.pipeline > 1 and not drawn:
            log.warning("the step has more than %d passes and is not drawn", MOST_TASKS)
        tasks = timeline(job, costs[0, 0], factors[0, 0]) if drawn else []
        if tasks or failures:
            plot(options.plot, document, tasks, failures)
            log.info("wrote %s", options.plot)
    if options.json:
        print(json.dumps(document, allow_nan=False))
    else:
        show(document)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

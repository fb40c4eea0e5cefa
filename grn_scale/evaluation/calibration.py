"""The rule of adaptive sampling, fitted to a model and the user's prompts. Writes adaptive.yaml and steps.png."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import atomic_file, write_bytes
from grn_scale.config.check import check_set
from grn_scale.config.schema import AdaptiveConfig
from grn_scale.data.buckets import choose_bucket
from grn_scale.errors import ConfigError
from grn_scale.evaluation.job import Job
from grn_scale.evaluation.prompts import read_prompts
from grn_scale.evaluation.steps import StepTargets, decision_entropies, describe_steps, fit_rule, steps_of
from grn_scale.sampling.source import open_pipeline

RULE, PICTURE = "adaptive.yaml", "steps.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --calibrate-steps."""
    parser.add_argument("--calibrate-steps", action="store_true",
                        help="fit sampling.adaptive.k and b to the entropies of the prompts")
    parser.add_argument("--mean-steps", type=float, metavar="N",
                        help="steps to aim at on average (default: 55 %% of sampling.tmax)")
    parser.add_argument("--spread", type=float, metavar="N", help="steps to aim at between the 10th and the 90th "
                        "percentile (default: 40 %% of sampling.tmax)")


def measure(job: Job) -> dict[str, Any]:
    """Fit the rule to the prompts, write it as YAML with a picture, and say what it gives."""
    source, config, options = job.checkpoint("--calibrate-steps"), job.config, job.options
    check_set(config, "text.encoder")
    prompts = read_prompts("--calibrate-steps", options.prompts, least=2)
    tmax = config.sampling.tmax
    for name in ("mean_steps", "spread"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name):g}, but must be greater than 0")
    targets = StepTargets(0.55 * tmax if options.mean_steps is None else options.mean_steps,
                          0.4 * tmax if options.spread is None else options.spread)
    pipeline, weights = open_pipeline(source, config, raw=options.raw)
    square = choose_bucket(1, 1, config.tokenize.latent_side)
    conditions = pipeline.conditions(prompts, frames=config.tokenize.max_frames, height=square.height,
                                     width=square.width, ratio_key=square.ratio_key)
    base = config.sampling.adaptive
    entropies = decision_entropies(pipeline, conditions, pipeline.settings(config.sampling), base.wp, config.seed)
    rule = fit_rule(entropies, targets, base, tmax)
    steps = steps_of(entropies, rule, tmax)
    job.make_folder()
    write_bytes(job.folder / RULE, _yaml(rule, tmax))
    _plot(entropies, steps, job.folder / PICTURE)
    return {"weights": weights, "prompts": len(prompts), "tmax": tmax, "rule": dataclasses.asdict(rule),
            "entropy": {"min": min(entropies), "mean": sum(entropies) / len(entropies), "max": max(entropies)},
            **describe_steps(steps, tmax)}


def _yaml(rule: AdaptiveConfig, tmax: int) -> bytes:
    """A run file's sampling section: k and b belong to tmax."""
    import yaml

    return yaml.safe_dump({"sampling": {"tmax": tmax, "adaptive": dataclasses.asdict(rule)}}, sort_keys=False).encode()


def _plot(entropies: Sequence[float], steps: Sequence[int], path: Path) -> None:
    """How the prompts' entropies are spread, and the steps they lead to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(entropies, steps, s=8)
    left.set(xlabel="relative entropy at the decision", ylabel="refinement steps")
    right.hist(steps, bins=range(min(steps), max(steps) + 2))
    right.set(xlabel="refinement steps", ylabel="prompts")
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def table(result: dict[str, Any], folder: Path) -> list[str]:
    """Lines for people."""
    rule = result["rule"]
    return [f"rule         k {rule['k']:g}, b {rule['b']:g}, decided at step {rule['wp']}: {folder / RULE}",
            f"steps        mean {result['mean']:.1f} of {result['tmax']}, 10th percentile {result['p10']:.0f}, "
            f"median {result['median']:.0f}, 90th {result['p90']:.0f}, {result['different']} different"]

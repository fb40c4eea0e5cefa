"""grn-scale evaluate: measure a trained model, or fit the sampler to it.

    grn-scale evaluate --run runs/first --held-out data.dataset=tokens/ output=measured/
    grn-scale evaluate --run runs/first --calibrate-steps --prompts prompts.txt text.encoder=encoder/ output=steps/

Writes evaluation.json; --calibrate-steps also adaptive.yaml, a run file's `sampling.adaptive` section, and steps.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import atomic_file, write_bytes, write_json
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_output, check_set
from grn_scale.config.schema import AdaptiveConfig, Config
from grn_scale.data.buckets import choose_bucket
from grn_scale.data.shards import Dataset
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.held_out import agreement, by_noise, held_out_packs
from grn_scale.evaluation.steps import StepTargets, decision_entropies, describe_steps, fit_rule, steps_of
from grn_scale.sampling.source import Source, open_pipeline, open_source

RESULT, RULE, PICTURE = "evaluation.json", "adaptive.yaml", "steps.png"


def main(argv: list[str]) -> int:
    """Run `grn-scale evaluate` with its arguments; the exit code."""
    parser = _parser()
    config, options = parser.parse_command(argv)
    if not options.held_out and not options.calibrate_steps:
        raise ConfigError("say what to measure: --held-out, --calibrate-steps, or both")
    start_logging()
    source = open_source(options.run)
    if options.config is None:
        config = source.run_config(options.overrides)
    check_set(config, "output")
    check_output(config.output)
    result: dict[str, Any] = {"checkpoint": str(source.checkpoint), "step": source.state.get("step")}
    folder = Path(config.output)
    if options.held_out:
        result["held_out"] = measure_held_out(source, config, options)
    if options.calibrate_steps:
        result["steps"] = calibrate(source, config, options, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, result)
    print(json.dumps(result, indent=1) if options.json else "\n".join(_lines(result, folder)))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "evaluate", "Measure a trained model on held-out samples, or fit the number of refinement steps to it. "
        "Without --config the run's own configuration holds.",
        "grn-scale evaluate --run runs/first --held-out data.dataset=tokens/ output=measured/", json=True)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder (its newest checkpoint) or step folder")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their moving average")
    parser.add_argument("--held-out", action="store_true", help="loss and bit accuracy by noise level on the held-out "
                        "samples of data.dataset, and whether training and sampling score them alike")
    parser.add_argument("--packs", type=int, default=8, metavar="N", help="held-out packs (default: 8)")
    parser.add_argument("--calibrate-steps", action="store_true",
                        help="fit sampling.adaptive.k and b to the entropies of the prompts")
    parser.add_argument("--prompts", metavar="FILE", help="text file with a prompt on each line")
    parser.add_argument("--mean-steps", type=float, metavar="N",
                        help="steps to aim at on average (default: 55 %% of sampling.tmax)")
    parser.add_argument("--spread", type=float, metavar="N", help="steps to aim at between the 10th and the 90th "
                        "percentile (default: 40 %% of sampling.tmax)")
    return parser


def measure_held_out(source: Source, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """`by_noise` and `agreement` of the source's model in train.precision."""
    import torch

    check_set(config, "data.dataset")
    if options.packs < 1:
        raise ConfigError(f"--packs is {options.packs}, but must be at least 1")
    dataset = Dataset.open(config.data.dataset)
    source.check_fingerprint("tokenizer", "data.dataset", dataset.info.tokenizer_fingerprint)
    source.check_fingerprint("text", "data.dataset", dataset.info.text_fingerprint)
    trained_with = source.state.get("config", {}).get("data", {}).get("validation_fraction")
    if trained_with is not None and config.data.validation_fraction > trained_with:
        raise ConfigError(f"data.validation_fraction is {config.data.validation_fraction:g}, but {source.checkpoint} "
                          f"was trained with {trained_with:g}: some of these samples were trained on, give at most "
                          "that")
    trained = source.load(raw=options.raw)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = trained.model.to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    packs = held_out_packs(dataset, config, model, options.packs)
    return {"weights": trained.weights, "precision": config.train.precision, **by_noise(model, packs),
            "training_and_sampling": agreement(model, packs)}


def calibrate(source: Source, config: Config, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Fit the rule of adaptive sampling to the prompts, write it as YAML with a picture, and say what it gives."""
    check_set(config, "text.encoder")
    prompts = _prompts(options.prompts)
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
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / RULE, _yaml(rule, tmax))
    _plot(entropies, steps, folder / PICTURE)
    return {"weights": weights, "prompts": len(prompts), "tmax": tmax, "rule": dataclasses.asdict(rule),
            "entropy": {"min": min(entropies), "mean": sum(entropies) / len(entropies), "max": max(entropies)},
            **describe_steps(steps, tmax)}


def _prompts(file: str | None) -> list[str]:
    if file is None:
        raise ConfigError("--calibrate-steps needs --prompts FILE, with a prompt on each line")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: cannot read {file}: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if len(prompts) < 2:
        raise UserError(f"--prompts: {file} holds {len(prompts)} prompts, but at least 2 are needed to fit a line")
    return prompts


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


def _lines(result: dict[str, Any], folder: Path) -> list[str]:
    lines = [f"checkpoint   {result['checkpoint']}"]
    if held_out := result.get("held_out"):
        lines += [f"held out     {held_out['samples']} samples in {held_out['packs']} packs: loss "
                  f"{held_out['loss']:.4f} nats a label, bit accuracy {held_out['bit_accuracy']:.2%}",
                  "p            " + "  ".join(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)),
                  "loss         " + "  ".join(_number(value) for value in held_out["loss_by_noise"]),
                  "accuracy     " + "  ".join(_number(value) for value in held_out["bit_accuracy_by_noise"])]
        same = held_out["training_and_sampling"]
        lines.append(f"agreement    scores of {same['samples']} samples differ by at most "
                     f"{same['largest_score_difference']:.2e} between training and sampling (standard deviation "
                     f"{same['score_standard_deviation']:.2f})")
    if steps := result.get("steps"):
        rule = steps["rule"]
        lines += [f"rule         k {rule['k']:g}, b {rule['b']:g}, decided at step {rule['wp']}: {folder / RULE}",
                  f"steps        mean {steps['mean']:.1f} of {steps['tmax']}, 10th percentile {steps['p10']:.0f}, "
                  f"median {steps['median']:.0f}, 90th {steps['p90']:.0f}, {steps['different']} different"]
    return [*lines, f"result       {folder / RESULT}"]


def _number(value: float | None) -> str:
    return "   -   " if value is None else f"{value:7.3f}"


if __name__ == "__main__":
    sys.exit(run(main))

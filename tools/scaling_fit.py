"""grn-scale scaling fit: the scaling law of finished runs, and the size to train for a budget of FLOPs.

A run folder gives the parameters of its config.yaml, the tokens and FLOPs of its metrics.jsonl, and the loss of its
last validation. docs/scaling_laws.md says which runs to make.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.class_schema import SCHEMAS, ClassConfig
from grn_scale.config.load import load_config
from grn_scale.config.schema import ParallelConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.planning.grn_parameters import stage_chunks
from grn_scale.planning.pictures import picture_format
from grn_scale.planning.scaling_law import COEFFICIENTS, Fit, Law, fit
from grn_scale.planning.scaling_report import plot, show
from grn_scale.planning.scaling_runs import FinishedRun, flops_factor, read_table
from grn_scale.train.metrics import FILE_NAME, read_metrics

log = logging.getLogger("grn_scale.scaling")

FLOPS_FACTOR = 6.0
"""FLOPs a parameter and token where the runs do not tell (Kaplan et al. 2020, section 2.1): attention is left out."""
BUDGETS = (1.0, 10.0, 100.0)
"""Times the FLOPs of the largest run, where no budget is given."""


def read_run(folder: Path) -> FinishedRun:
    """A run folder as a point of a scaling law. Raises UserError where it is not finished, or does not tell enough."""
    rows = read_metrics(folder / FILE_NAME)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.yaml, which tells its parameters: give its folder whole, or put the "
                        "run into a table (run, params, tokens, loss)")
    config = load_config(config_file, cls=SCHEMAS)
    if isinstance(config, ClassConfig):
        raise UserError(f"{folder} trains a class-to-image model, whose parameters are not counted from its "
                        "configuration: put the run into a table (run, params, tokens, loss)")
    params = sum(block.count for chunk in stage_chunks(config.model, ParallelConfig(), 0) for block in chunk.blocks)
    steps = [row for row in rows if "tokens" in row]
    if not steps or steps[-1]["step"] < config.train.steps:
        raise UserError(f"{folder} stands at step {steps[-1]['step'] if steps else 0} of {config.train.steps}: the "
                        "loss in the middle of a learning-rate schedule is not what a run of that length ends with; "
                        "finish it, or leave it out")
    losses = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    if not losses:
        raise UserError(f"{folder} has no validation_loss, and the training loss of single steps is too noisy: train "
                        "with data.validation_fraction and train.validate_every, or put the run into a table")
    flops = sum(row["model_tflops_per_second"] * row["step_seconds"] for row in steps) * 1e12
    return FinishedRun(str(folder), params, sum(row["tokens"] for row in steps), losses[-1], flops)


def document(runs: Sequence[FinishedRun], fitted: Fit, factor: float, budgets: Sequence[float],
             seed: int) -> dict[str, Any]:
    """The result as plain values; an interval is null without bootstrap samples."""
    def value(of: Callable[[Law], float]) -> dict[str, Any]:
        interval = fitted.interval([of(law) for law in fitted.samples]) if fitted.samples else None
        return {"value": float(of(fitted.law)), "interval": interval}

    errors = np.abs(np.expm1(fitted.residuals))
    worst = int(errors.argmax())
    largest = max(factor * run.params * run.tokens for run in runs)
    optima = []
    for budget in budgets:
        params, tokens = fitted.law.optimum(budget, factor)
        optima.append({
            "flops": budget, "over_largest_run": budget / largest, "tokens_per_parameter": tokens / params,
            "params": value(lambda law: law.optimum(budget, factor)[0]),
            "tokens": value(lambda law: law.optimum(budget, factor)[1]),
            "loss": value(lambda law: law.loss(*law.optimum(budget, factor)))})
    return {"runs": len(runs), "bootstrap_samples": len(fitted.samples), "seed": seed, "flops_factor": factor,
            "law": {**{name: value(lambda law: getattr(law, name)) for name in COEFFICIENTS},
                    "params_exponent": value(lambda law: law.beta / (law.alpha + law.beta))},
            "median_error": float(np.median(errors)), "largest_error": float(errors[worst]),
            "largest_error_run": runs[worst].name, "optima": optima}


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling fit argv...`."""
    parser = CommandParser(
        "scaling fit", "Fit the final loss of runs against their parameters and tokens, and say what to train for a "
        "budget.", "grn-scale scaling fit runs.csv runs/small runs/large --budget 1e21 --plot fit.png",
        configured=False, json=True)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="tables (.csv, .jsonl, .parquet) with the "
                        "columns run, params, tokens, loss and flops (may be left out), and run folders")
    parser.add_argument("--budget", type=float, action="append", metavar="FLOPS",
                        help="of training; may be given several times (default: 1, 10 and 100 times the largest run)")
    parser.add_argument("--flops-factor", type=float, metavar="K", help="FLOPs a parameter and token (default: median "
                        f"of the runs that tell their FLOPs, else {FLOPS_FACTOR:g})")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N",
                        help="samples of runs that intervals come from; 0 gives none (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="pictures of loss over compute and over size")
    options = parser.parse_options(argv)
    start_logging()
    for name, values in (("--budget", options.budget or []), ("--flops-factor", [options.flops_factor or 1.0])):
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise ConfigError(f"{name} must be a number above 0")
    if options.bootstrap < 0:
        raise ConfigError(f"--bootstrap is {options.bootstrap}, but must not be negative")
    kind = picture_format(options.plot) if options.plot else ""
    runs = [each for path in options.runs for each in ([read_run(path)] if path.is_dir() else read_table(path))]
    fitted = fit(*(np.array([getattr(each, name) for each in runs], dtype=np.float64)
                   for name in ("params", "tokens", "loss")), samples=options.bootstrap, seed=options.seed)
    told = flops_factor(runs)
    if told and not options.flops_factor and told[2] > 1.2 * told[1]:
        log.warning("FLOPs over params x tokens go from %.3g to %.3g among the runs, and their median is taken: the "
                    "budgets are of models in the middle (attention costs more on longer samples)", told[1], told[2])
    factor = options.flops_factor or (told[0] if told else FLOPS_FACTOR)
    largest = max(factor * each.params * each.tokens for each in runs)
    budgets = options.budget or [times * largest for times in BUDGETS]
    result = document(runs, fitted, factor, budgets, options.seed)
    if options.plot:
        plot(options.plot, kind, fitted.law, runs, factor, budgets)
        log.info("wrote %s", options.plot)
    if options.json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

"""grn-scale evaluate: measure a trained model, the video tokenizer or samples, or fit the sampler to a model.

    grn-scale evaluate --run runs/first --held-out data.dataset=tokens/ output=measured/
    grn-scale evaluate --run runs/first --calibrate-steps --prompts prompts.txt text.encoder=encoder/ output=steps/
    grn-scale evaluate --reconstruct data.manifest=clips.jsonl output=tokenizer/
    torchrun --nproc-per-node 8 -m grn_scale evaluate --run runs/first --generate --prompts prompts.txt \\
        --features i3d_torchscript.pt --input clips --statistics real.npz text.encoder=encoder/ output=measured/

Each measurement has a file of its own beside this one. Several may be asked for at once; evaluation.json has them all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_json
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_output, check_set
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError
from grn_scale.evaluation import calibration, features, generation, held_out, reconstruction
from grn_scale.evaluation.class_held_out import measure_held_out_classes
from grn_scale.evaluation.job import Job, processes, together
from grn_scale.parallel.dims import adopt_srun, world_size_from_environment
from grn_scale.sampling.source import open_source

RESULT = "evaluation.json"
ALONE = ("held_out", "calibrate_steps")
"""Measurements of one process."""
FROM_TEXT = ("calibrate_steps", "generate")
"""Measurements that a class-to-image model has no prompts for."""
MEASUREMENTS = ("held_out", "calibrate_steps", "reconstruct", "generate", "features")


def main(argv: list[str]) -> int:
    """Run `grn-scale evaluate` with its arguments; the exit code."""
    adopt_srun()
    parser = command_parser()
    options = parser.parse_unresolved(argv)
    asked = [name for name in MEASUREMENTS if getattr(options, name)]
    if not asked:
        raise ConfigError("say what to measure: --held-out, --calibrate-steps, --reconstruct, --generate, --features, "
                          "or several of them")
    if options.features:
        features.check(options)
    if world_size_from_environment() > 1 and any(name in ALONE for name in asked):
        raise ConfigError("--held-out and --calibrate-steps run in one process: leave torchrun or srun away")
    start_logging()
    source = open_source(options.run) if options.run else None
    if source is None:
        config = load_config(options.config, options.overrides, SCHEMAS)
    else:
        config = source.run_config(options.overrides, options.config)
        if source.class_model is not None and any(name in FROM_TEXT for name in asked):
            raise ConfigError(f"--calibrate-steps and --generate sample from prompts, but {source.checkpoint} makes "
                              "pictures by class: judge what `grn-scale sample --class` wrote with --samples FOLDER")
    check_set(config, "output")
    check_output(config.output)
    result: dict[str, Any] = {}
    if source is not None:
        result = {"checkpoint": str(source.checkpoint), "step": source.state.get("step")}
    with processes() as ranks:
        job = Job(source, config, options, Path(config.output), ranks)
        # What can fail for want of a file or a rule fails here, before hours of work.
        request = together(ranks, lambda: generation.check(job)) if options.generate else None
        instrument = features.prepared(job) if options.features else None
        if options.held_out:
            result["held_out"] = (held_out.measure(job) if source is None or source.class_model is None
                                  else measure_held_out_classes(source, config, options))
        if options.calibrate_steps:
            result["steps"] = calibration.measure(job)
        if options.reconstruct:
            result["reconstruction"] = reconstruction.measure(job)
        if options.generate:
            result["generated"] = generation.measure(job, request)
        if options.features:
            result["features"] = features.measure(job, instrument)
        if ranks.rank == 0:
            job.make_folder()
            write_json(job.folder / RESULT, result)
            print(json.dumps(result, indent=1) if options.json else "\n".join(_lines(result, job.folder)))
    return 0


def command_parser() -> CommandParser:
    """Parser of the command's arguments."""
    parser = CommandParser(
        "evaluate", "Measure a trained model, the video tokenizer or samples, or fit the number of refinement steps to "
        "a model. With --run and without --config the run's own configuration holds. --reconstruct, --generate and "
        "--features divide their work over the processes of torchrun or srun.",
        "grn-scale evaluate --run runs/first --held-out data.dataset=tokens/ output=measured/", json=True,
        schema=SCHEMAS)
    parser.add_argument("--run", metavar="RUN", help="run folder (its newest checkpoint) or step folder; --reconstruct "
                        "and --features of a folder need none")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their moving average")
    parser.add_argument("--prompts", metavar="FILE", help="text file with a prompt on each line")
    held_out.add_options(parser)
    calibration.add_options(parser)
    parser.add_argument("--reconstruct", action="store_true", help="PSNR and SSIM of the clips of data.manifest after "
                        "tokenizer.path, by rounds of HBQ kept")
    generation.add_options(parser)
    features.add_options(parser)
    return parser


def _lines(result: dict[str, Any], folder: Path) -> list[str]:
    """The result for people."""
    lines = [f"checkpoint   {result['checkpoint']}"] if "checkpoint" in result else []
    if part := result.get("held_out"):
        lines += held_out.table(part)
    if part := result.get("steps"):
        lines += calibration.table(part, folder)
    if part := result.get("reconstruction"):
        lines += reconstruction.table(part, folder)
    if part := result.get("generated"):
        lines += generation.table(part, folder)
    if part := result.get("features"):
        lines += features.table(part)
    return [*lines, f"result       {folder / RESULT}"]


if __name__ == "__main__":
    sys.exit(run(main))

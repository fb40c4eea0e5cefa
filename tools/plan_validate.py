"""grn-scale plan validate: the planner's model of dense transformers against published runs."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from grn_scale.atomic import write_bytes
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.errors import ConfigError
from grn_scale.planning.case_file import read_cases
from grn_scale.planning.hardware import load_efficiencies
from grn_scale.planning.pictures import picture_format
from grn_scale.planning.validate import judge
from grn_scale.planning.validate_report import page, plot, show

log = logging.getLogger("grn_scale.plan")

REPORT = "planner-validation"


def command_parser() -> CommandParser:
    parser = CommandParser(
        "plan validate", "Predict published runs and compare: throughput and memory, with the convention of each "
        "source, what was assumed where it says nothing, and what cannot be judged.",
        "grn-scale plan validate --cases docs/benchmarks/published_runs.json --plot validation.png", configured=False,
        json=True)
    parser.add_argument("--cases", type=Path, required=True, metavar="FILE.json",
                        help="published runs, in the format of docs/benchmarks/published_runs.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="picture of predicted over published figures")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help=f"write {REPORT}.md, .json and .png there, with "
                        "the errors on sources that were left out of the fit (a minute)")
    parser.add_argument("--fit", type=Path, metavar="FILE.yaml", help="fit the efficiencies on these cases and write "
                        "them: as configs/planner/fitted.yaml they are used")
    return parser


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale plan validate argv...`."""
    options = command_parser().parse_options(argv)
    start_logging()
    if options.plot:
        picture_format(options.plot)
    if options.report and not options.report.is_dir():
        raise ConfigError(f"--report {options.report} is no folder: create it first")
    cases, reached = read_cases(options.cases), load_efficiencies()
    if options.fit:
        from grn_scale.planning.fitting import fit, fitted_file, judged

        values = fit(cases, reached)
        names = [case["name"] for case, _, _ in judged(cases, reached)]
        write_bytes(options.fit, fitted_file(values, names).encode())
        log.info("wrote %s: %d efficiencies fitted on %d cases", options.fit, len(values), len(names))
        return 0
    document = judge(cases, reached)
    if options.plot:
        plot(options.plot, document)
        log.info("wrote %s", options.plot)
    if options.report:
        from grn_scale.planning.case_gaps import errors_without
        from grn_scale.planning.fitting import leave_one_source_out

        crossed, gaps = leave_one_source_out(cases, reached), errors_without(cases, reached)
        plot(options.report / f"{REPORT}.png", document)
        write_bytes(options.report / f"{REPORT}.json", (json.dumps(document, indent=1) + "\n").encode())
        write_bytes(options.report / f"{REPORT}.md", page(document, f"{REPORT}.png", crossed, gaps).encode())
        log.info("wrote %s.md, .json and .png to %s", REPORT, options.report)
    if options.json:
        print(json.dumps(document, allow_nan=False))
    else:
        show(document)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

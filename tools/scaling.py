"""grn-scale scaling: a matrix of measured runs on Slurm, from its file to the report; and scaling laws of runs.

    grn-scale scaling generate --config study.yaml output=STUDY
    grn-scale scaling submit STUDY --cluster site.yaml --submit --wait
    grn-scale scaling collect STUDY
    grn-scale scaling report STUDY
"""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

from grn_scale.command_line import CommandParser, choose, run, start_logging
from grn_scale.errors import EXIT_FAILED, ConfigError

DESCRIPTION = """Measure how runs scale, as a matrix of Slurm jobs:
  generate    write the folder of a study from its file
  submit      run every cell that has no result
  collect     read what the runs measured into results.parquet and results.csv
  report      report.html and report.md of it
  fit         the scaling law of finished runs
`grn-scale scaling generate --help` shows the options of one."""


def generate(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling generate argv...`."""
    from grn_scale.studies.study import generate as write
    from grn_scale.studies.study_file import read_study_file

    parser = CommandParser("scaling generate", "Write the folder of a study.",
                           "grn-scale scaling generate --config study.yaml output=studies/first", configured=False)
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="study file (docs/scaling.md)")
    parser.add_argument("output", metavar="output=FOLDER", help="the study's folder, which must be empty or absent")
    options = parser.parse_options(argv)
    key, equals, folder = options.output.partition("=")
    if key != "output" or not folder:
        raise ConfigError(f"{options.output!r}: give the folder as output=FOLDER")
    study = write(read_study_file(options.config), Path(folder))
    for series, size in dict.fromkeys((cell.series, cell.size) for cell in study.cells):
        print(f"{series}  {size.label} processes  {study.file.repeats} runs")
    for each in study.illegal:
        print(f"{each['series']}  {each['size']} processes  illegal: {each['reason']}")
    print(f"{len(study.cells)} cells in {study.folder}")
    return 0


def submit(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling submit argv...`."""
    from grn_scale.studies.study import read_study
    from grn_scale.tools.scaling_jobs import submit_missing

    parser = CommandParser("scaling submit", "Run every cell of a study that has no result; what waits or runs is left "
                           "alone, a failed cell starts afresh.",
                           "grn-scale scaling submit studies/first --cluster site.yaml --submit", configured=False)
    parser.add_argument("study", type=Path)
    parser.add_argument("--cluster", default="", metavar="FILE", help="facts of the site (default: GRN_SCALE_CLUSTER)")
    what = parser.add_mutually_exclusive_group(required=True)
    for name, text in (("print", "print the batch scripts"), ("dry-run", "check everything, submit nothing"),
                       ("submit", "submit the jobs")):
        what.add_argument(f"--{name}", dest="what", action="store_const", const=f"--{name}", help=text)
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="have N jobs in the queue at most (0: all)")
    parser.add_argument("--wait", action="store_true", help="stay until every job has ended")
    parser.add_argument("--time", metavar="LIMIT", help="of each job, such as 0:30:00")
    parser.add_argument("--partition", metavar="NAME", help="in place of the cluster file's")
    parser.add_argument("--account", metavar="NAME", help="in place of the cluster file's")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION=VALUE",
                        help="a further option of sbatch, such as reservation=NAME; may be repeated")
    options = parser.parse_options(argv)
    start_logging()
    if options.limit < 0:
        raise ConfigError(f"--limit is {options.limit}, but must not be negative")
    if options.what != "--submit" and (options.limit or options.wait):
        raise ConfigError(f"--limit and --wait are for --submit, not for {options.what}: leave them out")
    more = [word for name in ("time", "partition", "account") if (value := getattr(options, name))
            for word in (f"--{name}", value)]
    more += [f"--sbatch={option}" for option in options.sbatch]
    return submit_missing(read_study(options.study), options.cluster, options.what, more, options.limit, options.wait)


def collect(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling collect argv...`: 1 where cells have no result."""
    from grn_scale.studies.results import MEASURED, write_results
    from grn_scale.studies.study import read_study
    from grn_scale.tools.scaling_jobs import collected

    study = read_study(_parser("collect", "Read what the runs of a study measured.").parse_options(argv).study)
    rows, steps = collected(study)
    write_results(study.folder, rows, steps)
    for row in rows:
        print(f"{row['cell']}  {row['state']}  " + (f"{row['tokens_per_second']:,.0f} tokens/s"
                                                    if row["state"] == MEASURED else row["reason"]))
    return 0 if all(row["state"] == MEASURED for row in rows) else EXIT_FAILED


def report(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling report argv...`."""
    from grn_scale.studies.report import write_report
    from grn_scale.studies.results import read_results
    from grn_scale.studies.study import read_study

    parser = _parser("report", "Write report.html and report.md of a collected study.")
    parser.add_argument("--hardware", default="", metavar="NAME|FILE.yaml", help="what the planner's predictions count "
                        "with: a GPU of configs/hardware/, or a file that `grn-scale bench gpu --hardware FILE.yaml` "
                        "measured there (default: the GPU that the runs found)")
    options = parser.parse_options(argv)
    study = read_study(options.study)
    write_report(study, read_results(study.folder), options.hardware)
    print(study.folder / "report.html")
    return 0


def _parser(name: str, description: str) -> CommandParser:
    parser = CommandParser(f"scaling {name}", description, f"grn-scale scaling {name} studies/first", configured=False)
    parser.add_argument("study", type=Path)
    return parser


def _module(name: str, argv: list[str]) -> int:
    return importlib.import_module(name).main(argv)


def main(argv: list[str]) -> int:
    """Exit code of `grn-scale scaling argv...`."""
    return choose("scaling", argv, {"generate": generate, "submit": submit, "collect": collect, "report": report,
                                    "fit": functools.partial(_module, "grn_scale.tools.scaling_fit")}, DESCRIPTION)


if __name__ == "__main__":
    sys.exit(run(main))

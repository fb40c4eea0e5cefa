"""grn-scale plan: what a layout needs, before anything is reserved for it.

    grn-scale plan validate --config configs/runs/demo.yaml --world-size 8 parallel.tensor=2 parallel.pipeline=2
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

from grn_scale.command_line import CommandParser, choose, run
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.errors import EXIT_FAILED, ConfigError
from grn_scale.parallel.dry_run import CATEGORIES, DryRun, check_dry_run, dry_run

PLAIN_WIDTH = 120
"""Columns of the table where stdout is no terminal."""


def document(result: DryRun, seconds: float) -> dict[str, Any]:
    """The result as plain values, without the tensors of each class."""
    classes = [{name: value for name, value in dataclasses.asdict(each).items() if name != "tensors"}
               for each in result.classes]
    return {"classes": classes, "parameters": result.parameters, "differences": list(result.differences),
            "seconds": seconds}


def show(result: DryRun, seconds: float) -> None:
    """Print the result as a table, one row for each class of ranks."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    table = Table("stage", "ranks", "parameters", *CATEGORIES, "seconds", box=box.SIMPLE, collapse_padding=True,
                  title="pipeline stages: how many ranks are alike, and what one of them holds (GB)", pad_edge=False,
                  title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for each in result.classes:
        table.add_row(str(each.stage), str(each.ranks), f"{each.parameters:,}", *(
            f"{each.bytes[name] / 1e9:.3f}" for name in CATEGORIES), f"{each.seconds:.1f}")
    console.print(table)
    console.print(*(f"  {name}: {meaning}" for name, meaning in CATEGORIES.items()), sep="\n", soft_wrap=True)
    console.print(f"{result.parameters:,} parameters ({result.parameters / 1e9:.3f} B) in all, copies counted once; "
                  f"{seconds:.0f} s", soft_wrap=True)
    for difference in result.differences:
        console.print(f"differs from the model: {difference}", soft_wrap=True, markup=False)


def validate(argv: list[str]) -> int:
    """Exit code of `grn-scale plan validate argv...`; 1 where the stages do not hold exactly the model."""
    from rich.console import Console
    from rich.progress import Progress

    parser = CommandParser(
        "plan validate", "Try a layout without its processes: build, shard and step one rank of each pipeline stage on "
        "tensors without storage, and say what it holds.",
        "grn-scale plan validate --world-size 1024 model=configs/model/grn_8b.yaml parallel.tensor=8 "
        "parallel.pipeline=4 data.token_budget=16384 data.packs_per_step=128", schema=SCHEMAS, json=True)
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="processes of the run (default: 1)")
    config, options = parser.parse_command(argv)
    if options.world_size < 1:
        raise ConfigError(f"--world-size is {options.world_size}, but must be at least 1")
    check_dry_run(config, options.world_size)
    begin = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("pipeline stages", total=config.parallel.pipeline)
        result = dry_run(config, options.world_size, lambda: progress.advance(task))
    seconds = time.perf_counter() - begin
    if options.json:
        print(json.dumps(document(result, seconds)))
    else:
        show(result, seconds)
    return EXIT_FAILED if result.differences else 0


def main(argv: list[str]) -> int:
    """Exit code of the action that argv[0] names."""
    return choose("plan", argv, {"validate": validate}, __doc__)


if __name__ == "__main__":
    sys.exit(run(main))

"""grn-scale slurm: submit the other commands as jobs, and look after the jobs.

    grn-scale slurm train --cluster site.yaml --config configs/runs/demo.yaml data.dataset=tokens/ output=runs/a \\
        --nodes 2 --print
    grn-scale slurm tokenize --cluster site.yaml --config run.yaml data.manifest=clips.jsonl output=tokens/ \\
        --array 8 --submit
    grn-scale slurm status runs/a
"""

from __future__ import annotations

import functools
import importlib
import sys

from grn_scale.command_line import choose, run

JOBS = ("train", "tokenize", "convert", "evaluate")
LOOKS = ("status", "logs", "why", "cancel")

DESCRIPTION = """Submit a command as a Slurm job that saves before its end, goes back into the queue and goes on:
  train, tokenize, convert, evaluate    with the command's own arguments, and --print, --dry-run or --submit
Look after a job, given the output folder of what it runs:
  status    state, step, loss, speed, when it will be done, how often it was started and why
  logs      output of a process (--rank R), while it runs too
  why       what ended the last start, the process that is to blame first
  cancel    let it save and end, and not come back
`grn-scale slurm train --help` shows the options of jobs."""


def main(argv: list[str]) -> int:
    """Run `grn-scale slurm` with its arguments; the exit code."""
    return choose("slurm", argv, {**{kind: functools.partial(_submit, kind) for kind in JOBS},
                                  **{look: functools.partial(_look, look) for look in LOOKS}}, DESCRIPTION)


def _submit(kind: str, argv: list[str]) -> int:
    from grn_scale.slurm import submit

    return submit.main(kind, argv)


def _look(name: str, argv: list[str]) -> int:
    return importlib.import_module(f"grn_scale.slurm.{name}").main(argv)


if __name__ == "__main__":
    sys.exit(run(main))

"""Two measurements of conditional accuracy on the same prompts and draws, compared clip by clip.

    python -m grn_scale.demo.compare fixed/ adaptive/

The folders are outputs of `grn_scale.demo.accuracy`. The difference is the second minus the first; its 95 % interval is
taken over prompts, since clips of one prompt are alike.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.command_line import CommandParser, run
from grn_scale.demo.accuracy import CLIPS
from grn_scale.errors import UserError


def read_clips(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(prompt, draw) -> what clips.jsonl says of the clip. UserError where it cannot be read."""
    try:
        rows = [json.loads(line) for line in (folder / CLIPS).read_text(encoding="utf-8").splitlines()]
        return {(row["prompt"], row["draw"]): row for row in rows}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {folder / CLIPS} ({error!r}); give an output folder of grn_scale.demo.accuracy"
                        ) from error


def compare(first: dict, second: dict) -> dict[str, Any]:
    """Shares that are right on both sides, their difference with its 95 % interval, and mean steps.

    UserError where the two are not of the same prompts and draws.
    """
    if first.keys() != second.keys():
        raise UserError("the two measurements are not of the same prompts and draws: give the same --prompts, --seeds "
                        "and seed")
    prompts = sorted({prompt for prompt, _ in first})
    result: dict[str, Any] = {"clips": len(first), "prompts": len(prompts), "steps": [
        round(float(np.mean([row["steps"] for row in side.values()])), 3) for side in (first, second)]}
    for name in ("color", "direction"):
        by_prompt: dict[str, list[int]] = {prompt: [] for prompt in prompts}
        for key in first:
            by_prompt[key[0]].append(int(second[key][name]) - int(first[key][name]))
        differences = np.array([np.mean(values) for values in by_prompt.values()])
        half = 1.96 * differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else 0.0
        mean = float(differences.mean())
        result[name] = {"correct": [sum(int(row[name]) for row in side.values()) for side in (first, second)],
                        "difference": round(mean, 5), "interval_95": [round(mean - half, 5), round(mean + half, 5)]}
    return result


def main(argv: list[str]) -> int:
    """Print the comparison as JSON; the exit code."""
    parser = CommandParser("demo.compare", "Compare two measurements of conditional accuracy clip by clip.",
                           "python -m grn_scale.demo.compare fixed/ adaptive/", configured=False)
    parser.add_argument("first", metavar="FIRST")
    parser.add_argument("second", metavar="SECOND")
    options = parser.parse_options(argv)
    print(json.dumps(compare(read_clips(Path(options.first)), read_clips(Path(options.second))), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

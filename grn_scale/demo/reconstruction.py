"""How much of a clip survives the tokenizer: PSNR of encode -> quantise -> decode over the clips of manifests.

    python -m grn_scale.demo.reconstruction --config configs/runs/demo.yaml \\
        --manifest held_out=clips/held_out.jsonl --manifest real=clips/real.jsonl output=reconstruction/
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import write_json
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_set
from grn_scale.config.schema import Config
from grn_scale.data.decode import DecodeError
from grn_scale.data.manifest import Clip, load_manifest
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.clips import decode_as_tokenized
from grn_scale.evaluation.quality import quality
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.video import VideoTokenizer

RESULT = "reconstruction.json"


def measure(clips: Sequence[Clip], config: Config, tokenizer: VideoTokenizer, name: str) -> dict[str, Any]:
    """Mean, median, smallest and largest PSNR (dB) of the clips, and how many could not be decoded.

    Raises UserError where none could.
    """
    from rich.console import Console
    from rich.progress import track

    values, shapes, last = [], set(), None
    decoded = decode_as_tokenized(clips, config.tokenize)
    for _, truth in track(decoded, f"reconstructing {name}", total=len(clips), console=Console(stderr=True)):
        if isinstance(truth, DecodeError):
            last = truth
            continue
        values.append(quality(tokenizer, truth, config.model.rounds).psnr_db)
        shapes.add(truth.shape[:3])
    if not values:
        raise UserError(f"none of the {len(clips)} clips of {name} can be decoded; the last said: {last}")
    return {"clips": len(values), "undecodable_clips": len(clips) - len(values),
            "frame_shapes": sorted(list(shape) for shape in shapes),
            **{f"psnr_db_{word}": round(function(values), 3) for word, function in (
                ("mean", statistics.fmean), ("median", statistics.median), ("min", min), ("max", max))}}


def main(argv: list[str]) -> int:
    """Write reconstruction.json into the output folder and print it; the exit code."""
    parser = CommandParser("demo.reconstruction", "PSNR of clips that went through the video tokenizer.",
                           "python -m grn_scale.demo.reconstruction --config configs/runs/demo.yaml "
                           "--manifest real=clips/real.jsonl output=reconstruction/")
    parser.add_argument("--manifest", action="append", default=[], metavar="NAME=FILE",
                        help="may be given several times")
    config, options = parser.parse_command(argv)
    check_set(config, "output")
    named = [manifest.partition("=") for manifest in options.manifest]
    if not named or not all(name and file for name, _, file in named):
        raise ConfigError("say which clips to reconstruct: --manifest NAME=FILE")
    start_logging()
    tokenizer = load_tokenizer(config.tokenizer.path).to("cuda" if torch.cuda.is_available() else "cpu")
    result = {"tokenizer": tokenizer.fingerprint, "rounds": config.model.rounds,
              **{name: measure(load_manifest(file), config, tokenizer, name) for name, _, file in named}}
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

"""Does the model do what a caption asks? Clips of held-out combinations are sampled, and a detector looks at them.

    python -m grn_scale.demo.accuracy --config configs/runs/demo.yaml --run runs/first \\
        text.encoder=text_encoder/ output=accuracy/

The prompts are the combinations of attributes that no training clip shows (`shapes.held_out`), unless more are asked
for. What is counted is how often the detector finds the asked colour and the asked direction; chance is 1/6 and 1/4.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale import keyed
from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_set
from grn_scale.config.schema import Config
from grn_scale.data.buckets import bucket
from grn_scale.demo import shapes
from grn_scale.demo.detector import Detection, detect
from grn_scale.demo.shapes import Attributes
from grn_scale.errors import ConfigError
from grn_scale.sampling.output import progress_bar
from grn_scale.sampling.pictures import contact_sheet, png_bytes
from grn_scale.sampling.pipeline import GRNPipeline
from grn_scale.sampling.source import open_pipeline, open_source

RESULT = "accuracy.json"
SHEET = "contact_sheet.png"
CLIPS = "clips.jsonl"
"""One line a clip: prompt, draw, refinement steps, and whether colour and direction are right."""
SHEET_PROMPTS, SHEET_COLUMNS = 64, 8
SHEET_TITLE = ("Prompts held out of training, one clip of each. In brackets: what the detector saw instead of what was "
               "asked.")
NOTHING = "none"
"""Name of the detector's answer where it sees no shape, or no motion."""


HELD_OUT = 128
"""Combinations that no training clip shows; prompts beyond them are training's."""


def prompts(count: int = HELD_OUT) -> list[Attributes]:
    """The first `count` of all combinations, those held out first, in a fixed order."""
    ordered = sorted(shapes.held_out(), key=shapes.combinations().index)
    # The others in an order that mixes their attributes.
    others = sorted(shapes.training(), key=lambda attributes: keyed.key64("accuracy prompts", attributes.caption))
    return [*ordered, *others][:count]


def score(asked: Sequence[Attributes], seen: Sequence[Detection]) -> dict[str, Any]:
    """Counts and shares of clips whose colour, direction, and both are those asked for, with confusions.

    A confusion is {asked: {seen: clips}} over all clips, whatever their shape; "none" is no answer.
    """
    result: dict[str, Any] = {"clips": len(asked)}
    right = {}
    for name in ("color", "direction"):
        pairs = [(getattr(a, name), getattr(s, name) or NOTHING) for a, s in zip(asked, seen, strict=True)]
        right[name] = [wanted == found for wanted, found in pairs]
        counts = Counter(pairs)
        confusion = {wanted: {found: n for (w, found), n in sorted(counts.items()) if w == wanted}
                     for wanted in dict.fromkeys(wanted for wanted, _ in pairs)}
        result[name] = {**_share(right[name]), "confusion": confusion}
    result["both"] = _share([a and b for a, b in zip(right["color"], right["direction"])])
    return result


def spread_of(steps: Sequence[int]) -> dict[str, float]:
    """Mean, 10th and 90th percentile and number of different values of refinement steps."""
    low, high = np.percentile(steps, [10, 90])
    return {"mean": round(float(np.mean(steps)), 3), "p10": float(low), "p90": float(high),
            "different": len(set(steps))}


def _share(right: Sequence[bool]) -> dict[str, float]:
    return {"correct": sum(right), "accuracy": sum(right) / len(right)}


@dataclass(frozen=True)
class Sampler:
    """Turns captions into clips of the shape the configuration tokenizes."""

    pipeline: GRNPipeline
    config: Config
    steps: list[int] = field(default_factory=list)
    """Steps of each clip made so far."""
    seconds: list[float] = field(default_factory=list)
    """Wall time of each call's refinement steps; text encoding and decoding left out."""

    def __call__(self, captions: Sequence[str]) -> Iterator[np.ndarray]:
        """uint8 frames [T, height, width, 3] of each caption; clip b is sample number b of the seed."""
        square = bucket(1.0, self.config.tokenize.latent_side)
        conditions = self.pipeline.conditions(captions, frames=self.config.tokenize.max_frames, height=square.height,
                                              width=square.width, ratio_key=square.ratio_key)
        begin = time.perf_counter()
        with progress_bar("sampling", len(captions)) as advance:
            generated = self.pipeline.generate(conditions, self.pipeline.settings(self.config.sampling),
                                               seed=self.config.seed, observe=lambda maps: advance(len(maps.ended)))
        self.seconds.append(time.perf_counter() - begin)
        self.steps.extend(generated.steps)
        return self.pipeline.decode(generated)


def sample_and_detect(make: Callable[[Sequence[str]], Iterable[np.ndarray]], asked: Sequence[Attributes],
                      ) -> Iterator[tuple[np.ndarray, Detection]]:
    """Each asked clip with what the detector sees in it; a progress bar runs meanwhile.

    make: turns all captions into clips, in their order.
    """
    clips = make([attributes.caption for attributes in asked])
    with progress_bar("decoding and detecting", len(asked)) as advance:
        for clip in clips:
            yield clip, detect(clip)
            advance(1)


def _label(asked: Attributes, seen: Detection) -> str:
    """The caption, and in brackets each answer of the detector that is not what was asked for."""
    wrong = [getattr(seen, name) or f"no {name}" for name in ("color", "direction")
             if getattr(seen, name) != getattr(asked, name)]
    return asked.caption + (f" [{', '.join(wrong)}]" if wrong else "")


def main(argv: list[str]) -> int:
    """Write accuracy.json, clips.jsonl and contact_sheet.png into the output folder, print the first; the exit code."""
    parser = CommandParser("demo.accuracy", "Colour and direction of sampled clips against what is asked for.",
                           "python -m grn_scale.demo.accuracy --config configs/runs/demo.yaml --run runs/first "
                           "text.encoder=text_encoder/ output=accuracy/")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder, or one checkpoint in it")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their moving average")
    parser.add_argument("--prompts", type=int, default=HELD_OUT, metavar="N", help="the first N combinations, held-out "
                        "ones first (default: all 128 of these)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="clips of each prompt (default: 4)")
    config, options = parser.parse_command(argv)
    check_set(config, "output", "text.encoder")
    if min(options.seeds, options.prompts) < 1:
        raise ConfigError("--prompts and --seeds must be at least 1")
    start_logging()
    source = open_source(options.run)
    pipeline, weights = open_pipeline(source, config, raw=options.raw)
    sampler = Sampler(pipeline, config)
    chosen = prompts(options.prompts)
    asked = chosen * options.seeds
    begin = time.perf_counter()
    results = list(sample_and_detect(sampler, asked))
    result = {"checkpoint": str(source.checkpoint), "weights": weights,
              "sampling": dataclasses.asdict(config.sampling), "seed": config.seed, "prompts": len(chosen),
              "seeds": options.seeds, "seconds": round(time.perf_counter() - begin, 2),
              "sampling_seconds": round(sum(sampler.seconds), 2),
              "steps": spread_of(sampler.steps), **score(asked, [seen for _, seen in results])}
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    shown = list(zip(chosen, results))[:SHEET_PROMPTS]
    sheet = contact_sheet([clip for _, (clip, _) in shown], [_label(a, seen) for a, (_, seen) in shown],
                          columns=SHEET_COLUMNS, title=SHEET_TITLE)
    write_bytes(folder / SHEET, png_bytes(sheet))
    write_bytes(folder / CLIPS, "".join(json.dumps({
        "prompt": a.caption, "draw": n, "steps": steps, "color": seen.color == a.color,
        "direction": seen.direction == a.direction}) + "\n"
        for n, (a, (_, seen), steps) in enumerate(zip(asked, results, sampler.steps))).encode())
    write_json(folder / RESULT, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

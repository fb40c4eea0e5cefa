"""Does the model do what a caption asks? Clips of held-out combinations are sampled, and a detector looks at them.

    python -m grn_scale.demo.accuracy --config configs/runs/demo.yaml --run runs/first \\
        text.encoder=text_encoder/ output=accuracy/

The prompts are the combinations of attributes that no training clip shows (`shapes.held_out`). What is counted is how
often the detector finds the asked colour and the asked direction; chance is 1/6 and 1/4.
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
import torch

from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_set
from grn_scale.config.schema import Config
from grn_scale.data.buckets import bucket, latent_frames
from grn_scale.demo import shapes
from grn_scale.demo.detector import Detection, detect
from grn_scale.demo.shapes import Attributes
from grn_scale.errors import ConfigError
from grn_scale.sampling import Condition, SamplingSettings, generate
from grn_scale.sampling.pictures import contact_sheet, png_bytes
from grn_scale.sampling.source import TrainedModel, open_model
from grn_scale.sampling.video import decode_clips
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import TextEncoder, load_text_encoder, tagged_caption
from grn_scale.tokenizer.video import VideoTokenizer

RESULT = "accuracy.json"
SHEET = "contact_sheet.png"
CLIPS = "clips.jsonl"
"""One line a clip: prompt, draw, refinement steps, and whether colour and direction are right."""
BATCH_CLIPS = 64
SHEET_PROMPTS, SHEET_COLUMNS = 64, 8
SHEET_TITLE = ("Prompts held out of training, one clip of each. In brackets: what the detector saw instead of what was "
               "asked.")
NOTHING = "none"
"""Name of the detector's answer where it sees no shape, or no motion."""


def prompts(count: int | None = None) -> list[Attributes]:
    """The held-out combinations (the first `count`), in a fixed order."""
    ordered = sorted(shapes.held_out(), key=shapes.combinations().index)
    return ordered[:count]


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
    """All that turns captions into clips of the shape the configuration tokenizes."""

    trained: TrainedModel
    tokenizer: VideoTokenizer
    encoder: TextEncoder
    config: Config
    steps: list[int] = field(default_factory=list)
    """Steps of each clip made so far."""

    def __call__(self, captions: Sequence[str], first_draw: int) -> Iterator[np.ndarray]:
        """uint8 frames [T, height, width, 3] of each caption; clip b is sample number first_draw + b of the seed."""
        settings, model = self.config.tokenize, self.trained.model.config
        square = bucket(1.0, settings.latent_side)
        thw = (latent_frames(settings.max_frames), *square.grid)
        task = "T2V" if thw[0] > 1 else "T2I"
        *texts, empty = self.encoder.encode([*(tagged_caption(c, task, model.task_tags) for c in captions), ""])
        sampler = SamplingSettings.of(self.config.sampling, model)
        conditions = [Condition(text, empty, thw, square.ratio_key) for text in texts]
        generated = generate(self.trained.model, conditions, sampler, seed=self.config.seed, first_draw=first_draw)
        self.steps.extend(generated.steps)
        return decode_clips(self.tokenizer, generated.labels, model)


def sample_and_detect(make: Callable[[Sequence[str], int], Iterable[np.ndarray]], asked: Sequence[Attributes],
                      ) -> Iterator[tuple[np.ndarray, Detection]]:
    """Each asked clip with what the detector sees in it; a progress bar runs meanwhile."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    with Progress("sampling and detecting", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                  TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(asked))
        for first in range(0, len(asked), BATCH_CLIPS):
            batch = asked[first:first + BATCH_CLIPS]
            for clip in make([attributes.caption for attributes in batch], first):
                yield clip, detect(clip)
            bar.advance(task, len(batch))


def load_sampler(config: Config, run_folder: str, raw: bool) -> Sampler:
    """The newest checkpoint of a run with the tokenizer and text encoder it was trained behind.

    The moving average of the weights unless `raw`, in train.precision. UserError where something cannot be read, or
    is not what the run used.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = open_model(run_folder, raw=raw)
    tokenizer = load_tokenizer(config.tokenizer.path).to(device)
    trained.check_fingerprint("tokenizer", "tokenizer.path", tokenizer.fingerprint)
    encoder = load_text_encoder(config.text.encoder, config.text.max_tokens, device)
    trained.check_fingerprint("text", "text.encoder", encoder.fingerprint)
    trained.model.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    return Sampler(trained, tokenizer, encoder, config)


def _label(asked: Attributes, seen: Detection) -> str:
    """The caption, and in brackets each answer of the detector that is not what was asked for."""
    wrong = [getattr(seen, name) or f"no {name}" for name in ("color", "direction")
             if getattr(seen, name) != getattr(asked, name)]
    return asked.caption + (f" [{', '.join(wrong)}]" if wrong else "")


def main(argv: list[str]) -> int:
    """Write accuracy.json, clips.jsonl and contact_sheet.png into the output folder and print the former; the exit code."""
    parser = CommandParser("demo.accuracy", "Colour and direction of sampled clips against what is asked for.",
                           "python -m grn_scale.demo.accuracy --config configs/runs/demo.yaml --run runs/first "
                           "text.encoder=text_encoder/ output=accuracy/")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="run folder, or one checkpoint in it")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their moving average")
    parser.add_argument("--prompts", type=int, metavar="N", help="the first N held-out combinations (default: all 128)")
    parser.add_argument("--seeds", type=int, default=4, metavar="N", help="clips of each prompt (default: 4)")
    config, options = parser.parse_command(argv)
    check_set(config, "output", "text.encoder")
    if options.seeds < 1 or (options.prompts is not None and options.prompts < 1):
        raise ConfigError("--prompts and --seeds must be at least 1")
    start_logging()
    sampler = load_sampler(config, options.run, options.raw)
    chosen = prompts(options.prompts)
    asked = chosen * options.seeds
    begin = time.perf_counter()
    results = list(sample_and_detect(sampler, asked))
    result = {"checkpoint": str(sampler.trained.checkpoint), "weights": sampler.trained.weights,
              "sampling": dataclasses.asdict(config.sampling), "seed": config.seed, "prompts": len(chosen),
              "seeds": options.seeds, "seconds": round(time.perf_counter() - begin, 2),
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

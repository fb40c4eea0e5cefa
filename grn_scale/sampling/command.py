"""grn-scale sample: prompts -> videos (or pictures), or class ids -> pictures, from the checkpoint of a run.

    grn-scale sample --run runs/first --prompt "a red circle moves left" output=samples/
    grn-scale sample --run runs/images --class 207 --class 8 --count 4 output=samples/

Writes one file a sample, refinement.png (how the first sample emerged from noise) and, last, samples.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.atomic import write_bytes, write_json
from grn_scale.class_to_image.sample import ClassRequest, sample_classes
from grn_scale.command_line import CommandParser, run, start_logging
from grn_scale.config.check import check_output, check_set
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config
from grn_scale.data.buckets import choose_bucket, nearest_ratio_key
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip
from grn_scale.errors import ConfigError, UserError
from grn_scale.sampling.film import Film
from grn_scale.sampling.output import FILM_STRIP, SUMMARY, check_unused, make_folder, progress_bar
from grn_scale.sampling.pictures import png_bytes
from grn_scale.sampling.pipeline import task_of
from grn_scale.sampling.request import asked_frames, asked_size, prompt_lines
from grn_scale.sampling.sampler import StepMaps
from grn_scale.sampling.source import Source, open_pipeline, open_source
from grn_scale.sampling.video import encode_mp4

log = logging.getLogger(__name__)

TEXT_OPTIONS = ("prompt", "prompts", "negative", "frames", "size", "first_frame", "segments")
"""What only a model that makes video from text can be asked for."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    prompts: tuple[str, ...]
    negative: str
    count: int
    """Samples of each prompt."""
    frames: int
    size: tuple[int, int] | None
    """Height and width in pixels."""
    first_frame: str | None
    segments: int
    raw: bool
    """The trained weights, not their moving average."""

    @property
    def task(self) -> str:
        return task_of(self.frames, self.first_frame is not None)


@dataclass(frozen=True)
class Canvas:
    """Shape of the samples, and the picture they begin with."""

    height: int
    width: int
    ratio_key: float
    first_frame: np.ndarray | None
    """uint8 RGB [height, width, 3]"""


def main(argv: list[str]) -> int:
    """Run `grn-scale sample` with its arguments; the exit code."""
    parser = _parser()
    options = parser.parse_unresolved(argv)
    start_logging()
    source = open_source(options.run)
    config = source.run_config(options.overrides, options.config)
    check_set(config, "output")
    check_output(config.output)
    if options.count < 1:
        raise ConfigError(f"--count is {options.count}, but must be at least 1")
    if source.class_model is not None:
        summary = sample_classes(source, config, _class_request(options, parser, source))
    else:
        request = _request(options, config)
        check_set(config, "text.encoder")
        summary = sample(source, config, request)
    print(json.dumps(summary, indent=1) if options.json else _table(summary, Path(config.output)))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "sample", "Sample videos, or pictures with --frames 1, from a checkpoint; from one of a class-to-image model "
        "pictures of --class. Without --config the run's own configuration holds. The precision is train.precision.",
        "grn-scale sample --run runs/first --prompt 'a red circle moves left' output=samples/", json=True,
        schema=SCHEMAS)
    parser.add_argument("--run", required=True, metavar="RUN", help="run folder (its newest checkpoint) or step folder")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="may be given several times, and empty")
    parser.add_argument("--prompts", metavar="FILE", help="text file with a prompt on each line")
    parser.add_argument("--negative", default="", metavar="TEXT",
                        help="what guidance leads away from (default: the empty text)")
    parser.add_argument("--class", type=int, action="append", default=[], metavar="ID", dest="classes",
                        help="what a class-to-image model makes; may be given several times")
    parser.add_argument("--count", type=int, default=1, metavar="N",
                        help="samples of each prompt or class (default: 1)")
    parser.add_argument("--frames", type=int, metavar="N",
                        help="1 + 4k frames; 1 is a picture (default: tokenize.max_frames)")
    parser.add_argument("--size", metavar="HxW", help="pixels, multiples of 16 (default: the square bucket of "
                        "tokenize.latent_side, or the one nearest to --first-frame)")
    parser.add_argument("--first-frame", metavar="FILE",
                        help="image, or video whose first frame is taken, to begin with")
    parser.add_argument("--segments", type=int, default=1, metavar="N", help="make the clip N times as long: each "
                        "further segment continues from the last frame of the one before (default: 1)")
    parser.add_argument("--raw", action="store_true", help="the trained weights, not their moving average")
    return parser


def _class_request(options: argparse.Namespace, parser: CommandParser, source: Source) -> ClassRequest:
    remedy = f"give --class ID (0 .. {source.class_model.num_classes - 1}), as often as you like, and --count"
    if given := [name for name in TEXT_OPTIONS if getattr(options, name) != parser.get_default(name)]:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"{names} given, but {source.checkpoint} makes pictures of one size by class: {remedy}")
    if not options.classes:
        raise ConfigError(f"no class given: {remedy}")
    return ClassRequest(tuple(options.classes), options.count, options.raw)


def _request(options: argparse.Namespace, config: Config) -> Request:
    if options.classes:
        raise ConfigError(f"--class given, but {options.run} makes video from text: give --prompt TEXT")
    prompts = list(options.prompt)
    if options.prompts is not None:
        prompts += prompt_lines(options.prompts)
    if not prompts:
        raise ConfigError("no prompt given: use --prompt TEXT (it may be empty) or --prompts FILE")
    frames = asked_frames(options.frames, config.tokenize.max_frames)
    if options.first_frame and frames == 1:
        raise ConfigError("--first-frame is given, but --frames 1 leaves nothing to sample; 5 is the fewest")
    if options.segments < 1 or (options.segments > 1 and frames == 1):
        raise ConfigError(f"--segments is {options.segments}, but must be at least 1, and 1 for pictures")
    return Request(tuple(prompts), options.negative, options.count, frames, asked_size(options.size),
                   options.first_frame, options.segments, options.raw)


def sample(source: Source, config: Config, request: Request) -> dict[str, Any]:
    """Sample what is asked for into the folder config.output; the content of samples.json.

    Raises UserError where the folder holds anything already, or tokenizer or text encoder are not those the model was
    trained with.
    """
    folder = Path(config.output)
    check_unused(folder)
    pipeline, weights = open_pipeline(source, config, raw=request.raw)
    settings = pipeline.settings(config.sampling)
    if not settings.adaptive and settings.steps < settings.tmax - 1:
        log.warning("sampling.steps is %d, but the schedule is %d long (sampling.tmax): it is cut off while labels are "
                    "still noise; sampling.tmax=%d runs through it", settings.steps, settings.tmax, settings.steps)
    canvas = _canvas(request, config)
    make_folder(folder)

    prompts = [prompt for prompt in request.prompts for _ in range(request.count)]
    film = Film(0, settings.most_steps)
    with progress_bar("sampling", settings.most_steps * len(prompts) * request.segments) as advance:
        def observe(segment: int, maps: StepMaps) -> None:
            if segment == 0:
                film(maps)
            advance(sum(settings.most_steps - maps.step if n in maps.ended else 1 for n in maps.samples))
        result = pipeline.sample(prompts, settings, frames=request.frames, height=canvas.height, width=canvas.width,
                                 negative=request.negative, first_frame=canvas.first_frame,
                                 ratio_key=canvas.ratio_key, segments=request.segments, seed=config.seed,
                                 observe=observe)

    fps = source.fps or config.tokenize.fps
    files = []
    with progress_bar("writing", len(prompts)) as advance:
        for n, frames in enumerate(result.frames):
            files.append(_write_clip(folder, n, frames, fps))
            advance(1)
    texts = [pipeline.text(prompt, request.task) for prompt in prompts]
    strip = film.strip(pipeline.tokenizer, pipeline.model.config, texts[0] or "(empty prompt)")
    write_bytes(folder / FILM_STRIP, png_bytes(strip))
    summary = {
        "checkpoint": str(source.checkpoint), "step": source.state.get("step"), "weights": weights,
        "precision": config.train.precision, "device": str(pipeline.device), "seed": config.seed,
        "settings": dataclasses.asdict(settings), "tokenizer_fingerprint": pipeline.tokenizer.fingerprint,
        "text_fingerprint": pipeline.encoder.fingerprint, "model": to_dict(pipeline.model.config), "task": request.task,
        "negative": request.negative, "first_frame": request.first_frame, "frames": request.frames,
        "segments": request.segments,
        "height": canvas.height, "width": canvas.width, "ratio_key": canvas.ratio_key, "fps": fps,
        "film_strip": FILM_STRIP,
        "samples": [{"file": file, "draw": n, "prompt": prompt, "text": text, "steps": steps}
                    for n, (file, prompt, text, steps) in enumerate(zip(files, prompts, texts, result.steps))]}
    write_json(folder / SUMMARY, summary)
    return summary


def _canvas(request: Request, config: Config) -> Canvas:
    if request.first_frame is None:
        if request.size is None:
            bucket = choose_bucket(1, 1, config.tokenize.latent_side)
            return Canvas(bucket.height, bucket.width, bucket.ratio_key, None)
        return Canvas(*request.size, nearest_ratio_key(*request.size), None)
    size = {"latent_side": config.tokenize.latent_side} if request.size is None else dict(
        zip(("height", "width"), request.size))
    try:
        clip = decode_clip(DecodeRequest(request.first_frame, config.tokenize.fps, 1, **size))
    except DecodeError as error:
        raise UserError(f"--first-frame: {error}") from error
    height, width = clip.frames.shape[1:3]
    return Canvas(height, width, clip.ratio_key, clip.frames[0])


def _write_clip(folder: Path, number: int, frames: np.ndarray, fps: float) -> str:
    """Name of the file that now holds the sample: MP4, or PNG for a single frame."""
    from PIL import Image

    if len(frames) == 1:
        name, data = f"{number:04d}.png", png_bytes(Image.fromarray(frames[0]))
    else:
        name, data = f"{number:04d}.mp4", encode_mp4(frames, fps)
    write_bytes(folder / name, data)
    return name


def _table(summary: dict[str, Any], folder: Path) -> str:
    rows = [("checkpoint", f"{summary['checkpoint']} ({summary['weights']} weights)"),
            ("samples", f"{len(summary['samples'])} {summary['task']}, {summary['frames']} frames of "
                        f"{summary['height']}x{summary['width']}, seed {summary['seed']}"),
            *(("", f"{folder / entry['file']}  {entry['prompt'] if 'prompt' in entry else entry['class_id']}")
              for entry in summary["samples"]),
            ("film strip", str(folder / FILM_STRIP)), ("summary", str(folder / SUMMARY))]
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(run(main))

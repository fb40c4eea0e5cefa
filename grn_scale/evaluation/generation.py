"""Samples of many prompts, drawn by any number of processes: files without loss, and one list of them.

Writes samples/NNNNNN.mkv (or .png for single frames) and samples.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from grn_scale.atomic import write_bytes
from grn_scale.config.check import check_set
from grn_scale.data.buckets import Bucket, choose_bucket, nearest_ratio_key
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.job import Job, Shares, shared
from grn_scale.evaluation.progress import shown
from grn_scale.evaluation.prompts import read_prompts
from grn_scale.sampling.pictures import png_bytes
from grn_scale.sampling.request import asked_frames, asked_size
from grn_scale.sampling.source import open_pipeline

log = logging.getLogger(__name__)

FOLDER, ROWS = "samples", "samples.jsonl"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --generate."""
    parser.add_argument("--generate", action="store_true", help="sample --prompts into OUTPUT/samples, under torchrun "
                        "divided over its processes")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="samples of each prompt (default: 1)")
    parser.add_argument("--frames", type=int, metavar="N",
                        help="1 + 4k frames; 1 makes pictures (default: tokenize.max_frames)")
    parser.add_argument("--size", metavar="HxW", help="pixels, multiples of 16 (default: the square bucket of "
                        "tokenize.latent_side)")
    parser.add_argument("--negative", default="", metavar="TEXT",
                        help="what guidance leads away from (default: the empty text)")
    parser.add_argument("--together", type=int, default=16, metavar="N", help="samples drawn in one call; the same "
                        "number gives the same samples for any number of processes (default: 16)")


@dataclass(frozen=True)
class Request:
    """What is to be drawn."""

    prompts: tuple[str, ...]
    """One for each sample."""
    frames: int
    canvas: Bucket


def check(job: Job) -> Request:
    """What the options ask for; ConfigError or UserError where it cannot be drawn. Reads no model, writes nothing."""
    options, tokenize = job.options, job.config.tokenize
    job.checkpoint("--generate")
    for name in ("count", "together"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}, but must be at least 1")
    prompts = tuple(prompt for prompt in read_prompts("--generate", options.prompts) for _ in range(options.count))
    check_set(job.config, "text.encoder")
    size = asked_size(options.size)
    canvas = choose_bucket(1, 1, tokenize.latent_side) if size is None else Bucket(*size, nearest_ratio_key(*size))
    return Request(prompts, asked_frames(options.frames, tokenize.max_frames), canvas)


def measure(job: Job, request: Request) -> dict[str, Any]:
    """Draw the samples and say what was drawn. Sample n is draw n of the seed, whoever draws it.

    UserError where the folder of samples holds anything already, or parts do not belong to the model.
    """
    source, options, prompts = job.checkpoint("--generate"), job.options, request.prompts
    job.ranks.first(lambda: _new_folder(job))
    jobs = [range(first, min(first + options.together, len(prompts)))
            for first in range(0, len(prompts), options.together)]
    with shared(job) as shares:
        rows = sorted(shares.run(lambda: _draw(job, shares, jobs, request)), key=lambda row: row["draw"])
    steps = [row["steps"] for row in rows]
    low, high = np.percentile(steps, [10, 90])
    about = rows[0].pop("about")
    kept = [{key: value for key, value in row.items() if key != "about"} for row in rows]
    if job.ranks.rank == 0:
        write_bytes(job.folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
    return {"checkpoint": str(source.checkpoint), "samples": len(rows), "prompts": len(rows) // options.count,
            "count": options.count, "negative": options.negative, "seed": job.config.seed, "together": options.together,
            "steps": {"mean": statistics.fmean(steps), "p10": float(low), "p90": float(high),
                      "different": len(set(steps))}, **about}


def _new_folder(job: Job) -> None:
    folder = job.folder / FOLDER
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} is not an empty folder, and samples would overwrite it; give a new output")
    job.make_folder()
    folder.mkdir(exist_ok=True)


def _draw(job: Job, shares: Shares, jobs: Sequence[range], request: Request) -> list[dict[str, Any]]:
    source, config, options = job.checkpoint("--generate"), job.config, job.options
    prompts, frames, canvas = request.prompts, request.frames, request.canvas
    pipeline, weights = open_pipeline(source, config, raw=options.raw)
    settings = pipeline.settings(config.sampling)
    fps = source.fps or config.tokenize.fps
    about = {"weights": weights, "precision": config.train.precision, "settings": dataclasses.asdict(settings),
             "frames": frames, "height": canvas.height, "width": canvas.width, "fps": fps}
    rows: list[dict[str, Any]] = []
    total = len(range(shares.ranks.rank, len(jobs), shares.ranks.size))
    for _, numbers in shown(shares.mine(jobs), total, "sampling", shares.ranks.rank == 0):
        conditions = pipeline.conditions([prompts[n] for n in numbers], frames=frames, height=canvas.height,
                                         width=canvas.width, negative=options.negative, ratio_key=canvas.ratio_key)
        generated = pipeline.generate(conditions, settings, seed=config.seed, first_draw=numbers.start)
        for n, clip, steps in zip(numbers, pipeline.decode(generated), generated.steps):
            rows.append({"file": _write(job.folder, n, clip, fps), "draw": n, "prompt": prompts[n], "steps": steps,
                         "about": about})
    return rows


def _write(folder: Path, number: int, frames: np.ndarray, fps: float) -> str:
    """Name, from the output folder on, of the file that now holds the frames."""
    from PIL import Image

    if len(frames) == 1:
        name, data = f"{FOLDER}/{number:06d}.png", png_bytes(Image.fromarray(frames[0]))
    else:
        name, data = f"{FOLDER}/{number:06d}.mkv", encode_lossless(frames, fps)
    write_bytes(folder / name, data)
    return name


def encode_lossless(frames: np.ndarray, fps: float) -> bytes:
    """Matroska file (FFV1, RGB) of uint8 frames [T, H, W, 3]: what is measured must be what was sampled.

    The same bytes for the same frames.
    """
    import av

    rate, file = Fraction(fps).limit_denominator(1001), io.BytesIO()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("ffv1", rate=rate, options={"threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for i, pixels_of_frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def table(result: dict[str, Any], folder: Path) -> list[str]:
    """Lines for people."""
    return [f"samples      {result['samples']} of {result['prompts']} prompts, {result['frames']} frames of "
            f"{result['height']}x{result['width']}, mean {result['steps']['mean']:.1f} steps: {folder / ROWS}"]

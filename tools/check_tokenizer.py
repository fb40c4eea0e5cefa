"""Does the tokenizer hold on long, large videos? Streamed against one pass, memory against length, and PSNR.

    python -m grn_scale.tools.check_tokenizer CLIP.mp4 ... --output checked/

For every clip, at its own size (cut to whole cells of 16 pixels) and 1 + 4k frames:
- a tokenizer of random weights in the official architecture (widths 32 and 48) encodes and decodes it streamed and in
  one pass: how far both lie apart, and the peak memory of each;
- the first clip again at twice the length, streamed: its peak memory must not grow;
- the first five frames of the first clip at the official widths (160 and 256);
- the tokenizer that ships (`tokenizer.path`): the same, and the PSNR after HBQ.
Every measurement runs in a process of its own. Writes check.json, row by row. Exit code 1 where a bound is broken.
It takes about half an hour for four clips of 81 frames in 480p on two cores, and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grn_scale.atomic import write_json
from grn_scale.command_line import run, start_logging
from grn_scale.data.buckets import CELL_PIXELS, whole_groups
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip, probe
from grn_scale.errors import EXIT_FAILED, UserError
from grn_scale.evaluation.quality import compare, decode_bits
from grn_scale.hbq import quantize_bits
from grn_scale.perf.measure import peak_memory, surroundings
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.clips import PIECE_FRAMES, to_video
from grn_scale.tokenizer.layers import MidAttention, use_channels_last
from grn_scale.tokenizer.video import TIME_STRIDE, VideoTokenizer, VideoTokenizerShape

log = logging.getLogger("grn_scale.check_tokenizer")

RESULT = "check.json"
FEATURES, PART = "features.safetensors", "{:05d}.safetensors"
NARROW, OFFICIAL = (32, 48), (160, 256)
"""Widths of encoder and decoder."""
BOUNDS = {"relative_l2": 1e-5, "largest_over_deviation": 1e-4, "growth": 1.05}
"""How far streamed and one pass may lie apart, over all values and anywhere (in standard deviations of the output), and
how much streamed peak memory may grow at twice the length."""


@dataclass(frozen=True)
class Source:
    """A tokenizer and the frames it is given. Children make both themselves."""

    weights: str | tuple[int, int]
    """tokenizer.path, or widths of random weights."""
    file: Path
    """uint8 [frames, H, W, 3]"""
    size: tuple[int, int]
    frames: int
    length: int
    """Frames in the file; a longer clip begins again."""

    def tokenizer(self) -> VideoTokenizer:
        if isinstance(self.weights, str):
            return load_tokenizer(self.weights)
        torch.manual_seed(0)
        tokenizer = VideoTokenizer(VideoTokenizerShape(*self.weights, 64))
        for module in tokenizer.modules():
            if isinstance(module, MidAttention):
                module.proj.reset_parameters()  # it starts at zero, which would leave the attention unchecked
        return use_channels_last(tokenizer).eval().requires_grad_(False)

    def pieces(self) -> Iterator[np.ndarray]:
        """uint8 [n, H, W, 3]: frame 0, then groups of four, read when they are asked for."""
        with self.file.open("rb") as stream:
            for begin in (0, *range(1, self.frames, PIECE_FRAMES)):
                end = min(self.frames, begin + PIECE_FRAMES) if begin else 1
                yield np.stack([self._frame(stream, number % self.length) for number in range(begin, end)])

    def _frame(self, stream, number: int) -> np.ndarray:
        count = self.size[0] * self.size[1] * 3
        stream.seek(number * count)
        return np.fromfile(stream, np.uint8, count).reshape(*self.size, 3)


@torch.inference_mode()
def streamed(source: Source, folder: Path) -> dict[str, Any]:
    """Encode and decode piece by piece; the features and one file a decoded latent go into the folder."""
    tokenizer = source.tokenizer()
    begin = time.perf_counter()
    features = torch.cat(list(tokenizer.encode_stream(to_video(piece[None]) for piece in source.pieces())), 2)
    middle = time.perf_counter()
    save_file({"features": features.contiguous()}, folder / FEATURES)
    for number, video in enumerate(tokenizer.decode_stream(features.split(1, dim=2))):
        save_file({"video": video.contiguous()}, folder / PART.format(number))
    end = time.perf_counter()
    return {"encode_seconds": middle - begin, "decode_seconds": end - middle, **_peak()}


@torch.inference_mode()
def one_pass(source: Source, folder: Path) -> dict[str, Any]:
    """Encode and decode the whole clip, and compare with what `streamed` left in the folder."""
    tokenizer = source.tokenizer()
    video = to_video(np.concatenate(list(source.pieces()))[None])
    begin = time.perf_counter()
    features = tokenizer.encode(video)
    encode_seconds = time.perf_counter() - begin
    del video
    given = load_file(folder / FEATURES)["features"]
    encode = _apart([(given, features)])
    begin = time.perf_counter()
    decoded = tokenizer.decode(given)
    decode_seconds = time.perf_counter() - begin
    frames = decoded.tensor_split(list(range(1, decoded.shape[2], TIME_STRIDE)), 2)
    decode = _apart((load_file(folder / PART.format(number))["video"], piece) for number, piece in enumerate(frames))
    return {"encode": encode, "decode": decode, "encode_seconds": encode_seconds, "decode_seconds": decode_seconds,
            **_peak()}


@torch.inference_mode()
def psnr(source: Source, rounds: int) -> dict[str, Any]:
    """PSNR of the clip after encode, `rounds` rounds of HBQ, decode."""
    tokenizer = source.tokenizer()
    truth = np.concatenate(list(source.pieces()))
    features = torch.cat(list(tokenizer.encode_stream(to_video(piece[None]) for piece in source.pieces())), 2)
    found = compare(decode_bits(tokenizer, quantize_bits(features, rounds), rounds), truth, ssim=False)
    return {"psnr_db": found.psnr_db if math.isfinite(found.psnr_db) else None, "rounds": rounds, **_peak()}


def _peak() -> dict[str, int]:
    return {"peak_bytes": peak_memory()["process_bytes"]}


def _apart(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float | None]:
    """Relative L2 distance of all pairs together, and the largest difference in standard deviations; None for NaN."""
    difference = reference = total = largest = 0.0
    count = 0
    for mine, other in pairs:
        other = other.double()
        distance = mine.double() - other
        difference += distance.square().sum().item()
        reference += other.square().sum().item()
        total += other.sum().item()
        count += other.numel()
        largest = torch.maximum(torch.tensor(largest), distance.abs().max()).item()
    deviation = (reference / count - (total / count) ** 2) ** 0.5
    found = {"relative_l2": (difference / reference) ** 0.5, "largest_over_deviation": largest / deviation}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _alone(work, *arguments) -> dict[str, Any]:
    """What the function gives in a process of its own, so that its peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(f"the process of {work.__name__} was killed, most likely for its memory (one pass of a "
                            "480p clip of 81 frames takes 10 GB): use shorter clips, or a larger machine"
                            ) from error


def _read(clip: Path, folder: Path) -> Source:
    """The clip's frames as a file in the folder; UserError where it cannot be decoded."""
    try:
        found = probe(str(clip))
        size = tuple(side // CELL_PIXELS * CELL_PIXELS for side in (found.height, found.width))
        frames = decode_clip(DecodeRequest(str(clip), found.fps, whole_groups(found.frames), height=size[0],
                                           width=size[1])).frames
    except DecodeError as error:
        raise UserError(f"{clip}: {error}") from error
    file = folder / "frames.raw"
    frames.tofile(file)
    return Source("small", file, size, len(frames), len(frames))


def _equal(source: Source, weights: str | tuple[int, int], frames: int) -> dict[str, Any]:
    """Streamed and one pass of some frames, one after the other."""
    source = Source(weights, source.file, source.size, frames, source.length)
    with tempfile.TemporaryDirectory(prefix="grn-check-") as folder:
        first = _alone(streamed, source, Path(folder))
        second = _alone(one_pass, source, Path(folder))
    distances = {name: second.pop(name) for name in ("encode", "decode")}
    return {"weights": weights, "size": source.size, "frames": frames, **distances, "streamed": first,
            "one_pass": second}


def _longer(source: Source) -> dict[str, Any]:
    """Peak memory of the streamed clip, and of one of twice the length."""
    peaks = {}
    for frames in (source.frames, 2 * source.frames - 1):
        longer = Source(NARROW, source.file, source.size, frames, source.length)
        with tempfile.TemporaryDirectory(prefix="grn-check-") as folder:
            peaks[frames] = _alone(streamed, longer, Path(folder))["peak_bytes"]
    (_, short), (_, long) = peaks.items()
    return {"weights": NARROW, "size": source.size, "peak_bytes": peaks, "growth": long / short}


def check(clips: list[Path], rounds: int, folder: Path) -> dict[str, Any]:
    """Every measurement; after each one, check.json in the folder has those so far."""
    result: dict[str, Any] = {**surroundings(), "bounds": BOUNDS, "rows": []}

    def add(kind: str, clip: Path, row: dict[str, Any]) -> None:
        result["rows"].append({"kind": kind, "clip": clip.name, **row})
        write_json(folder / RESULT, result)
        log.info("%s", _line(result["rows"][-1]))

    for number, clip in enumerate(clips):
        with tempfile.TemporaryDirectory(prefix="grn-check-") as parts:
            source = _read(clip, Path(parts))
            add("psnr", clip, {"weights": "small", "size": source.size, "frames": source.frames,
                               **_alone(psnr, source, rounds)})
            add("equal", clip, _equal(source, "small", source.frames))
            add("equal", clip, _equal(source, NARROW, source.frames))
            if number == 0:
                add("memory", clip, _longer(source))
                add("equal", clip, _equal(source, OFFICIAL, 5))
    return result


def broken(result: dict[str, Any]) -> list[str]:
    """What lies outside the bounds, in words."""
    found = []
    for row in result["rows"]:
        for name in ("encode", "decode"):
            distances = row.get(name, {})
            if any(distances[key] is None or distances[key] > result["bounds"][key] for key in distances):
                found.append(f"{row['clip']}, {row['weights']}: {name} differs")
        if row.get("growth", 0) > result["bounds"]["growth"]:
            found.append(f"{row['clip']}: peak memory grew by {row['growth'] - 1:.1%}")
    return found


def _line(row: dict[str, Any]) -> str:
    name = f"{row['clip']:<14} {row['weights']!s:<11}"
    if row["kind"] == "psnr":
        value = "none: nothing differs" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        return f"{name} {row['frames']:3d} frames  PSNR {value}"
    if row["kind"] == "memory":
        sizes = ", ".join(f"{frames} frames {peak / 1e9:.3f} GB" for frames, peak in row["peak_bytes"].items())
        return f"{name} streamed peak: {sizes}, ratio {row['growth']:.3f}"
    apart = "  ".join(f"{word} " + " ".join("NaN" if value is None else f"{value:.1e}" for value in row[word].values())
                      for word in ("encode", "decode"))
    return (f"{name} {row['frames']:3d} frames  {apart}  streamed {row['streamed']['peak_bytes'] / 1e9:.1f} GB, "
            f"one pass {row['one_pass']['peak_bytes'] / 1e9:.1f} GB")


def main(argv: list[str]) -> int:
    """Check the clips of the command line; the exit code."""
    parser = argparse.ArgumentParser("check_tokenizer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    parser.add_argument("--rounds", type=int, default=4, help="HBQ rounds of the shipped tokenizer (default: 4)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(argv)
    missing = [str(clip) for clip in options.clips if not clip.is_file()]
    if missing:
        raise UserError(f"no such clip: {', '.join(missing)}")
    start_logging()
    options.output.mkdir(parents=True, exist_ok=True)
    result = check(options.clips, options.rounds, options.output)
    print("\n".join(map(_line, result["rows"])))
    for sentence in (failures := broken(result)):
        log.error("%s", sentence)
    print(json.dumps({"rows": len(result["rows"]), "broken": failures}))
    return EXIT_FAILED if failures else 0


if __name__ == "__main__":
    sys.exit(run(main))

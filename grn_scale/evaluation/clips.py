"""Clips to measure: those of a manifest, decoded as `grn-scale tokenize` does, or the files of a folder as they are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip
from grn_scale.data.decode_pool import DecodePool
from grn_scale.data.importers.entry import VIDEO_SUFFIXES
from grn_scale.data.manifest import Clip, load_manifest
from grn_scale.data.video_index import IMAGE_SUFFIXES
from grn_scale.errors import UserError

SAMPLES = "samples.json"
"""What `grn-scale sample` writes last: it lists the samples, and the film strip beside them is none."""


@dataclass(frozen=True)
class ClipSet:
    """Clips under one name for reports."""

    name: str
    clips: tuple[Clip | Path, ...]
    """Lines of a manifest, or files."""
    settings: TokenizeConfig
    """How manifest lines are decoded."""

    @classmethod
    def open(cls, place: str | Path, settings: TokenizeConfig) -> ClipSet:
        """The clips of a manifest (a file), or of a folder and the folders in it; UserError where there are none."""
        place = Path(place)
        clips = _files(place) if place.is_dir() else load_manifest(place)
        return cls(str(place), tuple(clips), settings)

    @property
    def fps(self) -> float | None:
        """Frames a second: of manifest lines as they are decoded, else of the first video; None of pictures alone."""
        if not isinstance(self.clips[0], Path):
            return self.settings.fps
        return next((_rate(file) for file in self.clips if file.suffix.lower() in VIDEO_SUFFIXES), None)

    def decode(self, clips: Iterable[Clip | Path], most: int | None = None,
               ) -> Iterator[tuple[str, np.ndarray | DecodeError]]:
        """(id, uint8 RGB frames [T, H, W, 3] or why there are none) of some of the clips, in their order.

        most: of a file no more than so many of its first frames.
        """
        if isinstance(self.clips[0], Path):
            return ((clip.name, _outcome(clip, most)) for clip in clips)
        return ((clip.id, result) for clip, result in decode_as_tokenized(clips, self.settings))


def decode_as_tokenized(clips: Iterable[Clip], settings: TokenizeConfig,
                        ) -> Iterator[tuple[Clip, np.ndarray | DecodeError]]:
    """(clip, uint8 RGB frames [T, H, W, 3] or why there are none): rate, length and bucket are those of tokenize.

    Decoded in child processes, a few clips ahead; `clips` may be an iterator.
    """
    asked, walked = itertools.tee(clips)
    requests = (DecodeRequest.of(clip, settings) for clip in asked)
    with DecodePool.of(settings) as pool:
        for clip, (_, result) in zip(walked, pool.map(requests)):
            yield clip, result if isinstance(result, DecodeError) else result.frames


def _files(folder: Path) -> list[Path]:
    listed = folder / SAMPLES
    if listed.is_file():
        try:
            names = [entry["file"] for entry in json.loads(listed.read_text(encoding="utf-8"))["samples"]]
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{listed} does not list samples ({error!r}): give the folder as `grn-scale sample` "
                            "wrote it, or a folder of media files without such a file") from error
    else:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"{folder} holds no video or picture ({', '.join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))})")
    return files


def _rate(file: Path) -> float | None:
    """Frames a second; None where the file does not say or cannot be read, which its decoding will tell."""
    import av

    try:
        with av.open(str(file)) as container:
            rate = container.streams.video[0].average_rate
    except (av.error.FFmpegError, IndexError, OSError):
        return None
    return float(rate) if rate else None


def _outcome(file: Path, most: int | None) -> np.ndarray | DecodeError:
    try:
        return read_frames(file, most)
    except DecodeError as error:
        return error


def read_frames(file: Path, most: int | None = None) -> np.ndarray:
    """The frames of a video or picture in their own size, uint8 RGB [T, H, W, 3]: all, or the first `most`.

    DecodeError where that fails; what comes after the frames that are wanted is not looked at.
    """
    import av
    from PIL import Image

    if file.suffix.lower() in IMAGE_SUFFIXES:
        try:
            with Image.open(file) as image:
                size = image.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DecodeError("unreadable", f"{file}: {error}") from error
        return decode_clip(DecodeRequest(str(file), 1.0, 1, height=size[1], width=size[0])).frames
    try:
        with av.open(str(file)) as container:
            frames = []
            for frame in itertools.islice(container.decode(video=0), most):
                if frame.is_corrupt:
                    raise DecodeError("corrupt", f"{file}: frame {len(frames) + 1} is damaged")
                frames.append(frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise DecodeError("unreadable", f"{file}: {error}") from error
    if not frames:
        raise DecodeError("zero_frames", f"{file} holds no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise DecodeError("corrupt", f"{file}: its frames are of several sizes")
    return np.stack(frames)

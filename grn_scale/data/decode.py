"""Video and image files to frames of a fixed size, chosen by their timestamps.

Nothing here imports torch: decoding processes start quickly and stay small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.buckets import Bucket, choose_bucket, nearest_ratio_key, whole_groups
from grn_scale.data.image_file import probe_image, read_image
from grn_scale.data.manifest import Clip
from grn_scale.data.media_file import Media, open_media
from grn_scale.data.video_index import (
    IMAGE_SUFFIXES,
    DecodeError,
    VideoIndex,
    VideoInfo,
    frame_count,
    nearest_frames,
)
from grn_scale.data.video_reader import VideoReader

__all__ = ["DecodeError", "DecodeRequest", "DecodedClip", "Media", "VideoInfo", "decode_clip", "open_media", "probe",
           "read_clip"]


@dataclass(frozen=True)
class DecodeRequest:
    """What to decode, and the size to bring it to: height and width, or the latent side that a bucket is chosen by."""

    path: str
    fps: float
    """Frames a second of the result."""
    max_frames: int
    """Most frames of the result; 1 takes the first frame of a video as an image."""
    begin_frame: int | None = None
    end_frame: int | None = None
    """Frame after the last, in display order."""
    height: int | None = None
    width: int | None = None
    latent_side: int | None = None
    flip: bool = False
    """Mirror the cropped frames left to right."""
    member: str | None = None
    """Name of the media file in the tar `path`; None: `path` itself is the media file."""

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None) or (self.height is None) == (self.latent_side is None):
            raise ValueError("a DecodeRequest needs either height and width, or latent_side")
        if self.fps <= 0 or self.max_frames < 1:
            raise ValueError(f"fps ({self.fps}) must be greater than 0 and max_frames ({self.max_frames}) at least 1")

    @classmethod
    def of(cls, clip: Clip, settings: TokenizeConfig) -> DecodeRequest:
        """How tokenize decodes a clip of a manifest."""
        return cls(str(clip.path), settings.fps, settings.max_frames, clip.begin_frame, clip.end_frame,
                   latent_side=settings.latent_side, flip=clip.flip, member=clip.member)

    @property
    def media(self) -> Media:
        """The file, or member of a tar, that is decoded."""
        return Media(self.path, self.member)


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Frames and how they were come by."""

    frames: np.ndarray
    """uint8 [T, height, width, 3], RGB, T = 1 + 4k."""
    ratio_key: float
    """Template of the bucket (the one nearest to height / width where those were given)."""
    backend: str
    """pyav or pillow."""
    codec: str
    rate_kind: str
    """constant, variable, or still for an image."""
    worst_timestamp_error_seconds: float
    """Largest distance between a wanted time and the source frame that was taken for it."""
    source_fps: float
    """0 for an image."""
    source_width: int
    """Pixels as displayed."""
    source_height: int
    rotation: int
    """Degrees counter-clockwise that the stored picture was turned by: 0, 90, 180 or 270."""
    pixel_aspect: float
    """Width of a stored pixel by its height."""
    pixel_format: str
    """As stored."""

    @property
    def provenance(self) -> dict[str, Any]:
        """What to keep with the sample about its source, as JSON values; the pixels' aspect only if not square."""
        about = {"backend": self.backend, "codec": self.codec, "pixel_format": self.pixel_format,
                 "rate_kind": self.rate_kind, "fps": self.source_fps, "width": self.source_width,
                 "height": self.source_height, "rotation": self.rotation,
                 "worst_timestamp_error_seconds": self.worst_timestamp_error_seconds}
        return about if self.pixel_aspect == 1 else {**about, "pixel_aspect": self.pixel_aspect}


def read_clip(path: str | Path, *, begin_frame: int | None = None, end_frame: int | None = None, fps: float,
              max_frames: int, height: int, width: int) -> np.ndarray:
    """Frames of a clip, uint8 [T, height, width, 3] RGB; see `decode_clip`."""
    return decode_clip(DecodeRequest(str(path), fps, max_frames, begin_frame, end_frame, height, width)).frames


def probe(path: str | Path, member: str | None = None) -> VideoInfo:
    """Facts of a video or image file, or of a member of the tar `path`; an image is one frame with fps 0.

    Decodes one frame of a video, none of an image. Raises DecodeError with a reason that says why a file cannot be
    decoded as a whole; damage inside it shows in decoding only.
    """
    media = Media(str(path), member)
    if media.suffix in IMAGE_SUFFIXES:
        return probe_image(media)
    with VideoReader(media) as reader:
        return reader.index.info


def decode_clip(request: DecodeRequest,
                allocate: Callable[[tuple[int, ...]], np.ndarray] | None = None) -> DecodedClip:
    """Frames at the times start + i/fps, resized to cover height x width (Lanczos) and cropped at the centre.

    T is the largest 1 + 4k that the clip holds, at most max_frames. A time counts as held if a source frame lies
    within half a source frame of it. Images give T = 1. `allocate` gives the uint8 array of a shape that the frames
    are written to, once the shape is known. Raises DecodeError with one of the reasons listed there.
    """
    allocate = allocate or (lambda shape: np.empty(shape, np.uint8))
    media = request.media
    if media.suffix in IMAGE_SUFFIXES:
        info = probe_image(media)
        bucket = _bucket(request, info)
        frames = allocate((1, bucket.height, bucket.width, 3))
        _store(read_image(media), info, bucket, request.flip, frames)
        return _clip(frames, bucket, info, "pillow", 0.0)
    with VideoReader(media) as reader:
        wanted, error = _wanted(media, reader.index, request)
        info = reader.index.info
        bucket = _bucket(request, info)
        frames = allocate((len(wanted), bucket.height, bucket.width, 3))
        # Sources slower than fps repeat frames; each is decoded and resized once.
        unique, places, repeats = np.unique(wanted, return_index=True, return_counts=True)
        for frame, place, repeat in zip(reader.rgb_frames(unique), places, repeats):
            _store(frame, info, bucket, request.flip, frames[place : place + repeat])
    return _clip(frames, bucket, info, "pyav", error)


def _clip(frames: np.ndarray, bucket: Bucket, info: VideoInfo, backend: str, error: float) -> DecodedClip:
    rate_kind = "still" if backend == "pillow" else "constant" if info.constant_rate else "variable"
    return DecodedClip(frames=frames, ratio_key=bucket.ratio_key, backend=backend, codec=info.codec,
                       rate_kind=rate_kind, worst_timestamp_error_seconds=error, source_fps=info.fps,
                       source_width=info.width, source_height=info.height, rotation=info.rotation,
                       pixel_aspect=info.pixel_aspect, pixel_format=info.pixel_format)


def _wanted(media: Media, index: VideoIndex, request: DecodeRequest) -> tuple[np.ndarray, float]:
    """Source frame of every frame of the result, int64 [T], ascending, and the worst distance in seconds."""
    begin = request.begin_frame or 0
    end = index.info.frames if request.end_frame is None else request.end_frame
    if not 0 <= begin < end <= index.info.frames:
        raise DecodeError("out_of_range", f"{media}: frames {begin} to {end} asked for, but the file holds "
                                          f"{index.info.frames}")
    count = whole_groups(min(request.max_frames, frame_count(index, begin, end, request.fps)))
    if count == 1 < whole_groups(request.max_frames):
        raise DecodeError("too_short", f"{media}: {end - begin} frames of {index.info.fps:.3g} a second give less than "
                                       f"the 5 frames at {request.fps:g} a second that the shortest video takes")
    return nearest_frames(index, begin, end, request.fps, count)


def _bucket(request: DecodeRequest, info: VideoInfo) -> Bucket:
    if request.latent_side is not None:
        return choose_bucket(info.height, info.width, request.latent_side)
    return Bucket(request.height, request.width, nearest_ratio_key(request.height, request.width))


def _store(frame: np.ndarray, info: VideoInfo, bucket: Bucket, flip: bool, out: np.ndarray) -> None:
    """Write a stored frame, uint8 [rows, columns, 3], to every frame of `out`, as it is displayed and fitted."""
    fitted = _fit(frame, info, bucket)
    if not flip:
        out[:] = fitted
        return
    for channel in range(3):  # takes a quarter of the time of all three at once
        out[..., channel] = fitted[:, ::-1, channel]


def _fit(frame: np.ndarray, info: VideoInfo, bucket: Bucket) -> np.ndarray:
    """Stored frame, uint8 [rows, columns, 3], turned upright, resized to cover the bucket and cropped at the centre."""
    if info.rotation:
        frame = np.rot90(frame, info.rotation // 90)
    rows, columns = frame.shape[:2]
    # The largest centred box with the bucket's shape. It is measured in displayed pixels, then scaled to stored
    # ones, which differ where pixels are not square.
    scale = min(info.height / bucket.height, info.width / bucket.width)
    high, wide = bucket.height * scale * rows / info.height, bucket.width * scale * columns / info.width
    top, left = max(0.0, (rows - high) / 2), max(0.0, (columns - wide) / 2)
    if (high, wide) == (bucket.height, bucket.width) and top.is_integer() and left.is_integer():
        return frame[int(top) : int(top) + bucket.height, int(left) : int(left) + bucket.width]
    box = (left, top, min(columns, left + wide), min(rows, top + high))
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box))

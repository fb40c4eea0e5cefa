"""Video and image files to frames of a fixed size, chosen by their timestamps.

decord decodes where it is proven exact for the file: H.264 at a constant rate whose frame count, key frames and
times, as decord sees them, equal those of the container's packets, and which a bare decoding pass finds undamaged.
PyAV decodes the rest, by timestamp. Both give the same pixels. Nothing here imports torch: decoding processes
start quickly and stay small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from grn_scale.data.buckets import Bucket, choose_bucket, nearest_ratio_key, whole_groups
from grn_scale.data.video_index import (
    IMAGE_SUFFIXES,
    DecodeError,
    VideoIndex,
    VideoInfo,
    frame_count,
    index_video,
    nearest_frames,
    open_for_reading,
    probe,
    require_file,
    video_stream,
)

__all__ = ["DecodeError", "DecodeRequest", "DecodedClip", "VideoInfo", "decode_clip", "probe", "read_clip"]

DECORD_CODECS = ("h264",)
DECORD_FORMATS = ("yuv420p", "yuv444p")
DECORD_CHUNK_FRAMES = 8
"""Frames decord hands over at a time, in source size: bounds memory."""


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

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None) or (self.height is None) == (self.latent_side is None):
            raise ValueError("a DecodeRequest needs either height and width, or latent_side")
        if self.fps <= 0 or self.max_frames < 1:
            raise ValueError(f"fps ({self.fps}) must be greater than 0 and max_frames ({self.max_frames}) at least 1")


@dataclass(frozen=True, eq=False)
class DecodedClip:
    """Frames and how they were come by."""

    frames: np.ndarray
    """uint8 [T, height, width, 3], RGB, T = 1 + 4k."""
    ratio_key: float
    """Template of the bucket (the one nearest to height / width where those were given)."""
    backend: str
    """decord, pyav or pillow."""
    codec: str
    worst_timestamp_error_seconds: float
    """Largest distance between a wanted time and the source frame that was taken for it."""
    source_fps: float
    """0 for an image."""
    source_width: int
    """Pixels as displayed."""
    source_height: int


def read_clip(path: str | Path, *, begin_frame: int | None = None, end_frame: int | None = None, fps: float,
              max_frames: int, height: int, width: int) -> np.ndarray:
    """Frames of a clip, uint8 [T, height, width, 3] RGB; see `decode_clip`."""
    return decode_clip(DecodeRequest(str(path), fps, max_frames, begin_frame, end_frame, height, width)).frames


def decode_clip(request: DecodeRequest) -> DecodedClip:
    """Frames at the times start + i/fps, resized to cover height x width (Lanczos) and cropped at the centre.

    T is the largest 1 + 4k that the clip holds, at most max_frames. A time counts as held if a source frame lies
    within half a source frame of it. Images give T = 1. Raises DecodeError with one of the reasons listed there.
    """
    path = Path(request.path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _decode_image(path, request)
    index = index_video(path)
    begin, end = _range(path, index, request)
    count = whole_groups(min(request.max_frames, frame_count(index, begin, end, request.fps)))
    if count == 1 < whole_groups(request.max_frames):
        raise DecodeError("too_short", f"{path}: {end - begin} frames of {index.info.fps:.3g} a second give less than "
                                       f"the 5 frames at {request.fps:g} a second that the shortest video takes")
    wanted, error = nearest_frames(index, begin, end, request.fps, count)
    bucket = _bucket(request, index.info.height, index.info.width)
    # Sources slower than fps repeat frames; each is decoded and resized once.
    unique, places = np.unique(wanted, return_inverse=True)
    fitted = np.empty((len(unique), bucket.height, bucket.width, 3), dtype=np.uint8)
    backend = "decord"
    reader = _decord_reader(path, index, unique)
    if reader is not None:
        _require_sound(path, index, int(unique[0]), int(unique[-1]))
    if reader is None or not _read_decord(reader, unique, index, fitted, bucket):
        backend = "pyav"
        for i, frame in enumerate(_read_pyav(path, index, unique)):
            fitted[i] = _fit(frame, index.info, bucket)
    return DecodedClip(frames=fitted[places], ratio_key=bucket.ratio_key, backend=backend, codec=index.info.codec,
                       worst_timestamp_error_seconds=error, source_fps=index.info.fps,
                       source_width=index.info.width, source_height=index.info.height)


def _range(path: Path, index: VideoIndex, request: DecodeRequest) -> tuple[int, int]:
    begin = request.begin_frame or 0
    end = index.info.frames if request.end_frame is None else request.end_frame
    if not 0 <= begin < end <= index.info.frames:
        raise DecodeError("out_of_range", f"{path}: frames {begin} to {end} asked for, but the file holds "
                                          f"{index.info.frames}")
    return begin, end


def _bucket(request: DecodeRequest, source_height: int, source_width: int) -> Bucket:
    if request.latent_side is not None:
        return choose_bucket(source_height, source_width, request.latent_side)
    return Bucket(request.height, request.width, nearest_ratio_key(request.height, request.width))


def _fit(frame: np.ndarray, info: VideoInfo, bucket: Bucket) -> np.ndarray:
    """Stored frame, uint8 [rows, columns, 3], turned upright, resized to cover the bucket and cropped at the centre."""
    if info.rotation:
        frame = np.rot90(frame, info.rotation // 90)
    rows, columns = frame.shape[:2]
    if (rows, columns) == (info.height, info.width) == (bucket.height, bucket.width):
        return frame
    # The largest centred box with the bucket's shape. It is measured in displayed pixels, then scaled to stored
    # ones, which differ where pixels are not square.
    scale = min(info.height / bucket.height, info.width / bucket.width)
    high, wide = bucket.height * scale * rows / info.height, bucket.width * scale * columns / info.width
    top, left = max(0.0, (rows - high) / 2), max(0.0, (columns - wide) / 2)
    box = (left, top, min(columns, left + wide), min(rows, top + high))
    image = Image.fromarray(np.ascontiguousarray(frame))
    return np.asarray(image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box))


def _decode_image(path: Path, request: DecodeRequest) -> DecodedClip:
    require_file(path)
    try:
        with Image.open(path) as image:
            codec = (image.format or "").lower()
            frame = np.asarray(_opaque(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise DecodeError(reason, f"{path}: {error}") from error
    height, width = frame.shape[:2]
    bucket = _bucket(request, height, width)
    fitted = _fit(frame, VideoInfo(width, height, 0.0, 1, 0.0, codec, 0, True), bucket)
    return DecodedClip(frames=fitted[None].copy(), ratio_key=bucket.ratio_key, backend="pillow", codec=codec,
                       worst_timestamp_error_seconds=0.0, source_fps=0.0, source_width=width, source_height=height)


def _opaque(image: Image.Image) -> Image.Image:
    """RGB image; what is transparent becomes white, not whatever colour hides under it."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _decord_reader(path: Path, index: VideoIndex, wanted: np.ndarray):
    """decord.VideoReader if decord is proven exact for this file, else None."""
    info = index.info
    if not (info.codec in DECORD_CODECS and index.pixel_format in DECORD_FORMATS and info.constant_rate
            and info.frames > 1 and info.rotation == 0 and index.clean_order):
        return None
    try:
        import decord
    except ImportError:  # decord has wheels for few machines; PyAV gives the same frames
        return None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        starts = np.asarray(reader.get_frame_timestamp(wanted.tolist()))[:, 0]
    except (decord.DECORDError, IndexError):
        return None
    exact = (len(reader) == info.frames and np.array_equal(reader.get_key_indices(), index.key_frames)
             and np.abs(starts - index.seconds[wanted]).max() < index.frame_seconds / 4)
    return reader if exact else None


def _read_decord(reader, wanted: np.ndarray, index: VideoIndex, out: np.ndarray, bucket: Bucket) -> bool:
    """Fill `out` with the wanted frames; False where decord gives up, so that PyAV decides what is wrong."""
    import decord

    try:
        for start in range(0, len(wanted), DECORD_CHUNK_FRAMES):
            part = wanted[start:start + DECORD_CHUNK_FRAMES]
            for i, frame in enumerate(reader.get_batch(part.tolist()).asnumpy(), start=start):
                out[i] = _fit(frame, index.info, bucket)
    except decord.DECORDError:
        return False
    return True


def _read_pyav(path: Path, index: VideoIndex, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The wanted frames (ascending, unique), uint8 RGB as stored. DecodeError: unreadable, corrupt."""
    times = index.times[wanted].tolist()
    with closing(_sound_frames(path, index, int(wanted[0]), int(wanted[-1]), {})) as frames:
        for frame in frames:
            if times and frame.pts == times[0]:
                del times[0]
                yield frame.to_ndarray(format="rgb24")
    if times:
        raise DecodeError("corrupt", f"{path}: the decoder gives no frame {wanted[-len(times)]}, though the file "
                                     "lists it")


def _require_sound(path: Path, index: VideoIndex, first: int, last: int) -> None:
    """Raise DecodeError('corrupt') where frames first..last, or those they build on, are damaged.

    decord hides damage by repeating pixels and does not tell. Without the deblocking filter and the conversion to
    RGB this second look is cheap.
    """
    for _ in _sound_frames(path, index, first, last, {"skip_loop_filter": "all"}):
        pass


def _sound_frames(path: Path, index: VideoIndex, first: int, last: int,
                  options: dict[str, str]) -> Iterator[av.VideoFrame]:
    """Decoded frames in display order, from `first` or earlier to `last`; DecodeError('corrupt') at the first damage.

    Damage spreads to every later frame up to the next key frame, so a damaged frame that is not wanted counts too.
    """
    keys = index.key_frames[index.key_frames <= first]
    key_time = int(index.times[keys[-1] if len(keys) else 0])
    with open_for_reading(path) as container:
        stream = video_stream(container)
        stream.codec_context.options = options
        try:
            for frame in _frames_from(container, stream, key_time):
                if frame.pts is None or frame.pts < key_time:
                    continue
                if frame.is_corrupt:
                    raise DecodeError("corrupt", f"{path}: the frame at "
                                                 f"{float(frame.pts * index.time_base):.3f} s is damaged")
                yield frame
                if frame.pts >= index.times[last]:
                    return
        except av.error.FFmpegError as error:
            raise DecodeError("corrupt", f"{path}: decoding frames {first} to {last} fails: {error}") from error


def _frames_from(container: av.container.InputContainer, stream: av.video.stream.VideoStream,
                 key_time: int) -> Iterator[av.VideoFrame]:
    """Decoded frames from the key frame at `key_time` or from an earlier one on."""
    container.seek(key_time, stream=stream)
    frames = container.decode(stream)
    head = next(frames, None)
    if head is None or head.pts is None or head.pts > key_time:
        # Some containers seek by stored order and land too late: go through the file from its start.
        with open_for_reading(container.name) as again:
            yield from again.decode(video_stream(again))
        return
    yield head
    yield from frames

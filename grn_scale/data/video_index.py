"""What a video file holds, found from its packets without decoding them: the time of every frame, and whether
the file keeps what its header promises.

Frame numbers count in display order. Files are opened for reading only.
"""

from __future__ import annotations

import functools
import math
import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))


class DecodeError(Exception):
    """A clip that gives no frames. `reason` is one word for counting:

    missing          no such file
    unreadable       not a media file, or one that cannot be opened
    no_video_stream  a media file without moving or still pictures
    zero_frames      a video stream without a frame
    no_timestamps    packets without times (raw elementary streams)
    truncated        the file ends before what its header promises
    corrupt          the decoder met damaged data inside the clip
    out_of_range     the clip's frame range lies outside the file
    too_short        fewer frames than the shortest video takes
    timeout          decoding took longer than the limit
    crashed          the decoding process died, or failed in a way not listed here
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video or image file."""

    width: int
    """Pixels as displayed: rotated, and with non-square pixels stretched."""
    height: int
    fps: float
    """Mean frame rate from the timestamps; 0 for a single frame."""
    frames: int
    duration: float
    """Seconds from the first frame to the end of the last."""
    codec: str
    rotation: int
    """Degrees counter-clockwise that turn the stored picture into the displayed one: 0, 90, 180 or 270."""
    constant_rate: bool
    """Every frame lies on a regular grid, up to the rounding of the container's clock."""


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """VideoInfo and the time of every frame."""

    info: VideoInfo
    times: np.ndarray
    """int64 [frames], ascending, in ticks of `time_base`."""
    time_base: Fraction
    key_frames: np.ndarray
    """int64, ascending: frames at which decoding can start."""
    clean_order: bool
    """Times are unique, nothing is marked to be discarded, and no frame crosses a key frame between stored and
    display order. Then counting frames from a key frame, as decord does, hits the right one."""
    pixel_format: str

    @property
    def seconds(self) -> np.ndarray:
        """float64 [frames]: the times in seconds."""
        return self.times * float(self.time_base)

    @property
    def frame_seconds(self) -> float:
        """Typical time a frame is shown."""
        if len(self.times) > 1:
            return float(np.median(np.diff(self.seconds)))
        return self.info.duration


def require_file(path: Path) -> None:
    """Raise DecodeError('missing') unless `path` is a file."""
    if not path.is_file():
        raise DecodeError("missing", f"{path} is no file")


def index_video(path: str | Path) -> VideoIndex:
    """Index of a video file. Reads all packets of the stream, but decodes the first frame only.

    The last few files are remembered, since the clips of one source follow each other.
    Raises DecodeError: missing, unreadable, no_video_stream, zero_frames, no_timestamps, truncated.
    """
    path = Path(path)
    require_file(path)
    status = path.stat()
    return _index_video(str(path), status.st_size, status.st_mtime_ns)


def probe(path: str | Path) -> VideoInfo:
    """Facts of a video or image file; an image is one frame with fps 0. Raises DecodeError as `index_video` does."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return index_video(path).info
    from PIL import Image, ImageOps

    require_file(path)
    try:
        with Image.open(path) as image:
            codec = (image.format or "").lower()
            width, height = ImageOps.exif_transpose(image).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DecodeError("unreadable", f"{path}: {error}") from error
    return VideoInfo(width, height, 0.0, 1, 0.0, codec, 0, True)


@functools.lru_cache(maxsize=8)
def _index_video(path: str, size: int, mtime_ns: int) -> VideoIndex:
    try:
        with av.open(path, metadata_errors="replace") as container:
            return _index(path, container)
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError("truncated" if _mp4_ends_early(path, size) else "unreadable", f"{path}: {error}") from error


def _index(path: str, container: av.container.InputContainer) -> VideoIndex:
    stream = video_stream(container)
    if stream is None:
        raise DecodeError("no_video_stream", f"{path} holds no video stream")
    packets = _read_packets(path, container, stream)
    times = np.sort(packets.times[~packets.discarded])
    if not len(times):
        raise DecodeError("zero_frames", f"{path} marks every frame as not shown")
    _check_promises(path, container, stream, packets, times)

    container.seek(packets.start, stream=stream)
    frame = next(container.decode(stream), None)
    if frame is None:
        raise DecodeError("zero_frames", f"{path}: no frame of its video stream can be decoded")
    rotation = int(round(frame.rotation / 90)) * 90 % 360
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * aspect)), frame.height
    if rotation % 180:
        width, height = height, width
    base = stream.time_base
    fps, constant = _rate(times, float(base))
    last = float(np.median(np.diff(times))) if len(times) > 1 else packets.last_duration
    info = VideoInfo(width=width, height=height, fps=fps, frames=len(times),
                     duration=(float(times[-1] - times[0]) + last) * float(base),
                     codec=stream.codec_context.name, rotation=rotation, constant_rate=constant)
    times.flags.writeable = False
    key_frames = np.searchsorted(times, np.sort(packets.times[packets.keys]))
    return VideoIndex(info=info, times=times, time_base=base, key_frames=key_frames,
                      clean_order=_is_clean(packets, times), pixel_format=stream.codec_context.pix_fmt or "")


@dataclass(frozen=True, eq=False)
class _Packets:
    """What is kept of the packets of a stream, in stored order; never their data, which may be gigabytes."""

    times: np.ndarray
    """int64 ticks at which each is shown."""
    keys: np.ndarray
    """bool: decoding can start here."""
    discarded: np.ndarray
    """bool: decoded for others, not shown (edit lists)."""
    start: int
    """Ticks to seek to for the first packet."""
    last_duration: int
    last_corrupt: bool


def _read_packets(path: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> _Packets:
    facts, first, last = [], None, None
    for packet in container.demux(stream):
        if not packet.size and packet.dts is None:
            continue  # the mark that the stream has ended
        if packet.pts is None:
            raise DecodeError("no_timestamps", f"{path} has packets without timestamps; put it into a container, "
                                               "for example ffmpeg -i IN -c copy OUT.mkv")
        facts.append((packet.pts, packet.is_keyframe, packet.is_discard))
        last = packet
        if first is None:
            first = packet.pts if packet.dts is None else packet.dts
    if last is None:
        raise DecodeError("zero_frames", f"{path} holds a video stream without frames")
    times, keys, discarded = (np.array(column) for column in zip(*facts))
    return _Packets(times, keys, discarded, first, last.duration or 0, last.is_corrupt)


def _is_clean(packets: _Packets, times: np.ndarray) -> bool:
    """See VideoIndex.clean_order. At a clean key frame all stored before are shown before, all after after."""
    stored = packets.times
    latest_before = np.concatenate(([np.iinfo(np.int64).min], np.maximum.accumulate(stored)[:-1]))
    earliest_from = np.minimum.accumulate(stored[::-1])[::-1]
    at_keys = (latest_before < stored) & (earliest_from == stored)
    return bool(len(times) == len(stored) and np.all(np.diff(times) > 0) and packets.keys[0]
                and np.all(at_keys[packets.keys]))


def _rate(times: np.ndarray, tick_seconds: float) -> tuple[float, bool]:
    """(mean frames a second, whether every time is within one tick or 1 % of a frame of the regular grid)."""
    if len(times) < 2 or times[-1] == times[0]:
        return 0.0, len(times) == 1
    period = (times[-1] - times[0]) / (len(times) - 1)
    deviation = np.abs(times - (times[0] + np.arange(len(times)) * period)).max()
    return float(1.0 / (period * tick_seconds)), bool(deviation <= max(1.0, 0.01 * period))


def _check_promises(path: str, container: av.container.InputContainer, stream: av.video.stream.VideoStream,
                    packets: _Packets, times: np.ndarray) -> None:
    """Compare the packets found with what the header says of their number and duration."""
    held = len(packets.times)
    if stream.frames > held:
        raise DecodeError("truncated", f"{path} promises {stream.frames} frames, but holds {held}")
    if packets.last_corrupt:
        raise DecodeError("truncated", f"{path} ends inside its last packet")
    promised = _promised_seconds(container, stream)
    if promised is None:
        return
    base = float(stream.time_base)
    origin = min(0.0, float(times[0]) * base) if container.start_time is None else container.start_time / 1e6
    last = packets.last_duration or (np.median(np.diff(times)) if len(times) > 1 else 0)
    end = float(times[-1] + last) * base - origin
    # Writers round the duration and may count the last frame or not, hence the two frames of grace.
    if end < promised - max(2 * float(last) * base, 0.05):
        raise DecodeError("truncated", f"{path} promises {promised:.3f} s, but its frames end at {end:.3f} s")


def _promised_seconds(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> float | None:
    """End of the video stream by the header, in seconds from the container's start; None where it does not say."""
    # Only Matroska and WebM: other formats count their frames (checked above) or derive the duration from what is
    # there. The file's duration is the longest stream's; a stream's own stands in a tag, which goes stale where a
    # tool shortens the file and copies the tags.
    if "matroska" not in container.format.name or container.duration is None:
        return None
    whole = container.duration / 1e6
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag:
        return min(whole, int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3]))
    return whole if len(container.streams) == 1 else None


def _mp4_ends_early(path: str, size: int) -> bool:
    """Whether a file of `size` bytes that starts as MP4/MOV lacks its index or ends inside a top-level box."""
    try:
        with open(path, "rb") as file:
            position, kinds = 0, []
            while position + 8 <= size:
                file.seek(position)
                header = file.read(16)
                length, kind = int.from_bytes(header[:4], "big"), header[4:8]
                if length == 1:
                    length = int.from_bytes(header[8:], "big")
                elif length == 0:
                    length = size - position
                kinds.append(kind)
                if kinds[0] != b"ftyp" or length < 8:
                    return False
                position += length
    except OSError:
        return False  # the error that brought us here says why the file cannot be read
    return bool(kinds) and (position != size or b"moov" not in kinds)


def frame_count(index: VideoIndex, begin: int, end: int, fps: float) -> int:
    """Frames at `fps` that the source frames begin..end-1 hold: each has a source frame within half a frame of it."""
    seconds = index.seconds
    reach = seconds[end - 1] - seconds[begin] + index.frame_seconds / 2
    return max(1, math.floor(reach * fps - 1e-6) + 1)


def nearest_frames(index: VideoIndex, begin: int, end: int, fps: float, count: int) -> tuple[np.ndarray, float]:
    """Source frames nearest to the times start + i/fps, i < count, and the largest distance in seconds.

    The frames are int64 [count] in display order, out of begin..end-1; the earlier one where two are equally near.
    """
    seconds = index.seconds[begin:end] - index.seconds[begin]
    wanted = np.arange(count) / fps
    middles = (seconds[1:] + seconds[:-1]) / 2
    chosen = np.searchsorted(middles, wanted - 1e-9, side="left")
    return chosen + begin, float(np.abs(seconds[chosen] - wanted).max())


def video_stream(container: av.container.InputContainer) -> av.video.stream.VideoStream | None:
    """First video stream that is no cover picture of a sound file, set to decode in one thread: processes decode
    side by side already, and starting threads costs more than a short clip.
    """
    pictures = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & pictures:
            stream.codec_context.thread_count = 1
            return stream
    return None


def open_for_reading(path: str | Path) -> av.container.InputContainer:
    """PyAV container; DecodeError('unreadable') where it cannot be opened."""
    try:
        return av.open(os.fspath(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError("unreadable", f"{path}: {error}") from error

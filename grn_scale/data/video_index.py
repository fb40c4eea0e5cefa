"""What a video file holds, found from its packets without decoding them: the time of every frame, and whether
the file keeps what its header promises.

Frame numbers count in display order. Files are opened for reading only.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from grn_scale.data.media_file import BUFFER_BYTES, Media
from grn_scale.data.recent import Recent

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp"))
"""What is read as a picture; everything else is a video."""


class DecodeError(Exception):
    """A clip that gives no frames. `reason` is one word for counting:

    missing          no such file, or no such member of the tar
    unreadable       not a media file, or one that cannot be opened
    no_video_stream  a media file without moving or still pictures
    zero_frames      a video stream without a frame
    no_timestamps    packets without times (raw elementary streams)
    truncated        the file ends before what its header promises
    corrupt          the decoder met damaged data inside the clip
    out_of_range     the clip's frame range lies outside the file
    too_short        fewer frames than the shortest video takes
    timeout          decoding took longer than the limit
    out_of_memory    decoding takes more memory than the limit
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
    pixel_aspect: float
    """Width of a stored pixel by its height: 1 where pixels are square."""
    pixel_format: str
    """As stored, in FFmpeg's words (yuv420p10le); of an image its mode in Pillow's (RGB)."""


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """VideoInfo and the time of every frame."""

    info: VideoInfo
    times: np.ndarray
    """int64 [frames], ascending, in ticks of `time_base`."""
    time_base: Fraction
    key_frames: np.ndarray
    """int64, ascending: frames at which decoding can start."""

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


def require_file(media: Media) -> tuple[int, int]:
    """Stamp of the file on disk (see `Media.stamp`); DecodeError('missing') unless it is a file."""
    try:
        return media.stamp()
    except FileNotFoundError as error:
        raise DecodeError("missing", f"{media} is no file") from error
    except OSError as error:
        raise DecodeError("unreadable", f"{media}: {error}") from error


@contextmanager
def open_container(media: Media) -> Iterator[av.container.InputContainer]:
    """PyAV's container of a file. DecodeError: missing, unreadable, truncated."""
    require_file(media)
    with ExitStack() as stack:
        with _telling_what_is_wrong(media):
            source = os.path.abspath(media.path) if media.member is None else stack.enter_context(media.open())
            container = stack.enter_context(av.open(source, metadata_errors="replace", buffer_size=BUFFER_BYTES))
        yield container


@contextmanager
def _telling_what_is_wrong(media: Media) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # one of PyAV's errors, but no fault of the file
        raise
    except FileNotFoundError as error:
        raise DecodeError("missing", f"{media}: {error}") from error
    except (av.error.FFmpegError, OSError) as error:
        raise DecodeError("truncated" if _mp4_ends_early(media) else "unreadable", f"{media}: {error}") from error


def video_stream(media: Media, container: av.container.InputContainer) -> av.video.stream.VideoStream:
    """First video stream that is no cover picture of a sound file, set to decode in one thread: processes decode
    side by side already, and starting threads costs more than a short clip. DecodeError: no_video_stream,
    unreadable.
    """
    pictures = av.stream.Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & pictures:
            if stream.codec_context is None:
                raise DecodeError("unreadable", f"{media}: there is no decoder for its video stream")
            stream.codec_context.thread_count = 1
            return stream
    raise DecodeError("no_video_stream", f"{media} holds no video stream")


def index_video(path: str | Path, member: str | None = None) -> VideoIndex:
    """Index of a video file, or of a member of the tar `path`.

    Raises DecodeError: missing, unreadable, no_video_stream, zero_frames, no_timestamps, truncated.
    """
    media = Media(str(path), member)
    with open_container(media) as container:
        return index_stream(media, container, video_stream(media, container))[0]


_INDICES: Recent[tuple[Media, tuple[int, int]], VideoIndex] = Recent(8)
"""Of the files read last: the clips of one source follow each other."""


def index_stream(media: Media, container: av.container.InputContainer, stream: av.video.stream.VideoStream,
                 ) -> tuple[VideoIndex, Iterator[av.VideoFrame] | None]:
    """Index of the open file, and its decoded frames from the first on (None where the index was at hand).

    Reads all packets, and decodes one frame. Raises DecodeError as `index_video` does.
    """
    begun = None

    def make(_: object) -> VideoIndex:
        nonlocal begun
        index, begun = _index(media, container, stream)
        return index

    with _telling_what_is_wrong(media):
        return _INDICES.get((media, require_file(media)), make), begun


def _index(media: Media, container: av.container.InputContainer,
           stream: av.video.stream.VideoStream) -> tuple[VideoIndex, Iterator[av.VideoFrame]]:
    packets = _read_packets(media, container, stream)
    times = np.sort(packets.times[~packets.discarded])
    if not len(times):
        raise DecodeError("zero_frames", f"{media} marks every frame as not shown")
    _check_promises(media, container, stream, packets, times)

    container.seek(packets.start, stream=stream)
    frames = container.decode(stream)
    frame = next(frames, None)
    if frame is None:
        raise DecodeError("zero_frames", f"{media}: no frame of its video stream can be decoded")
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
                     codec=stream.codec_context.codec.canonical_name, rotation=rotation, constant_rate=constant,
                     pixel_aspect=float(aspect), pixel_format=frame.format.name)
    times.flags.writeable = False
    key_frames = np.searchsorted(times, np.sort(packets.times[packets.keys]))
    return VideoIndex(info, times, base, key_frames), itertools.chain((frame,), frames)


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


def _read_packets(media: Media, container: av.container.InputContainer,
                  stream: av.video.stream.VideoStream) -> _Packets:
    facts, first, last = [], None, None
    for packet in container.demux(stream):
        if not packet.size and packet.dts is None:
            continue  # the mark that the stream has ended
        if packet.pts is None:
            raise DecodeError("no_timestamps", f"{media} has packets without timestamps; put it into a container, "
                                               "for example ffmpeg -i IN -c copy OUT.mkv")
        facts.append((packet.pts, packet.is_keyframe, packet.is_discard))
        last = packet
        if first is None:
            first = packet.pts if packet.dts is None else packet.dts
    if last is None:
        raise DecodeError("zero_frames", f"{media} holds a video stream without frames")
    times, keys, discarded = (np.array(column) for column in zip(*facts))
    return _Packets(times, keys, discarded, first, last.duration or 0, last.is_corrupt)


def _rate(times: np.ndarray, tick_seconds: float) -> tuple[float, bool]:
    """(mean frames a second, whether every time is within one tick or 1 % of a frame of the regular grid)."""
    if len(times) < 2 or times[-1] == times[0]:
        return 0.0, len(times) == 1
    period = (times[-1] - times[0]) / (len(times) - 1)
    deviation = np.abs(times - (times[0] + np.arange(len(times)) * period)).max()
    return float(1.0 / (period * tick_seconds)), bool(deviation <= max(1.0, 0.01 * period))


def _check_promises(media: Media, container: av.container.InputContainer, stream: av.video.stream.VideoStream,
                    packets: _Packets, times: np.ndarray) -> None:
    """Compare the packets found with what the header says of their number and duration."""
    held = len(packets.times)
    if stream.frames > held:
        raise DecodeError("truncated", f"{media} promises {stream.frames} frames, but holds {held}")
    if packets.last_corrupt:
        raise DecodeError("truncated", f"{media} ends inside its last packet")
    promised = _promised_seconds(container, stream)
    if promised is None:
        return
    base = float(stream.time_base)
    origin = min(0.0, float(times[0]) * base) if container.start_time is None else container.start_time / 1e6
    last = packets.last_duration or (np.median(np.diff(times)) if len(times) > 1 else 0)
    end = float(times[-1] + last) * base - origin
    # Writers round the duration and may count the last frame or not, hence the two frames of grace.
    if end < promised - max(2 * float(last) * base, 0.05):
        raise DecodeError("truncated", f"{media} promises {promised:.3f} s, but its frames end at {end:.3f} s")


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


def _mp4_ends_early(media: Media) -> bool:
    """Whether a file that starts as MP4/MOV lacks its index or ends inside a top-level box."""
    try:
        with media.open() as file:
            size, position, kinds = file.seek(0, io.SEEK_END), 0, []
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

"""Small media files whose frames say their own number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 8


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 RGB [count, height, width, 3]: eight vertical bars spell the frame's number, white for a 1."""
    bars = (np.arange(count)[:, None] >> np.arange(BITS)) & 1
    columns = np.arange(width) * BITS // width
    frames = np.where(bars[:, columns], 220, 30).astype(np.uint8)
    return np.repeat(np.repeat(frames[:, None, :, None], height, axis=1), 3, axis=3)


def numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, height, width, 3] spell."""
    width = frames.shape[2]
    centers = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    bars = frames[:, frames.shape[1] // 2, centers, :].mean(-1) > 125
    return [int((row << np.arange(BITS)).sum()) for row in bars]


def write_video(path: Path, frames: np.ndarray, fps: int = 24, *, codec: str = "libx264", pix_fmt: str = "yuv420p",
                options: dict[str, str] | None = None, container_options: dict[str, str] | None = None,
                milliseconds: list[int] | None = None, rotation: int = 0, pixel_aspect: Fraction | None = None,
                colorspace: int | None = None) -> Path:
    """Encode frames at `fps`, or at the given times; returns `path`."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        if pixel_aspect:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_edited(path: Path, frames: np.ndarray, hidden: int, fps: int = 24) -> Path:
    """H.264 in MP4 whose edit list hides the first `hidden` frames, which others build on; returns `path`."""
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"bf": "0", "g": "250"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in [*frames, None]:
            for packet in stream.encode(None if pixels is None else av.VideoFrame.from_ndarray(pixels, "rgb24")):
                packet.pts -= round(hidden / fps / packet.time_base)
                packet.dts = packet.pts
                container.mux(packet)
    return path


def write_empty(path: Path) -> Path:
    """MP4 with a video stream that holds no frame; returns `path`."""
    write_video(path, numbered_frames(2), container_options={"movflags": "frag_keyframe+empty_moov"})
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"moof") - 4])
    return path


def write_overstated(path: Path, frames: np.ndarray, promised: int) -> Path:
    """AVI whose header promises more frames than it holds; returns `path`."""
    write_video(path, frames, codec="mpeg4")
    data = bytearray(path.read_bytes())
    length = data.index(b"strh") + 8 + 32
    data[length : length + 4] = promised.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def write_sound(path: Path) -> Path:
    """One second of sound and nothing to see; returns `path`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        for start in range(0, 44100 - 1024, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 44100, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path

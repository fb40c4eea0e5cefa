"""One open video file: its index, and its frames in display order, damage told.

PyAV decodes everything. decord was measured against it for H.264 at constant rates, the files it is exact for. It hides
damaged frames, so that the proof takes a second pass by PyAV, and its decoding alone takes 1.3 to 1.8 times the CPU
seconds of PyAV's (240p to 2160p, one thread). It decodes faster only where few frames far apart are wanted, and there
the proof costs more than it saves. tests/unit/test_decode.py keeps it as a witness: both give the same pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from types import TracebackType

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from grn_scale.data.media_file import Media
from grn_scale.data.video_index import DecodeError, index_stream, open_container, video_stream


class VideoReader:
    """An open video file. Use it as a context manager.

    Opening raises DecodeError: missing, unreadable, no_video_stream, zero_frames, no_timestamps, truncated.
    """

    def __init__(self, media: Media):
        self.media = media
        with ExitStack() as stack:
            self._container = stack.enter_context(open_container(media))
            self._stream = video_stream(media, self._container)
            self.index, self._begun = index_stream(media, self._container, self._stream)
            self._opened = stack.pop_all()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._opened.close()

    def rgb_frames(self, wanted: np.ndarray) -> Iterator[np.ndarray]:
        """The wanted frames (numbers in display order, ascending, unique), uint8 [rows, columns, 3], as stored.

        DecodeError: corrupt.
        """
        times = self.index.times[wanted].tolist()
        converter = VideoReformatter()
        with closing(self._sound_frames(int(wanted[0]), int(wanted[-1]))) as frames:
            for frame in frames:
                if times and frame.pts == times[0]:
                    del times[0]
                    # One thread: starting threads for every frame costs more than the conversion.
                    plane = converter.reformat(frame, format="rgb24", threads=1).planes[0]
                    yield np.ndarray((plane.height, plane.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        if times:
            raise DecodeError("corrupt", f"{self.media}: the decoder gives no frame {wanted[-len(times)]}, though the "
                                         "file lists it")

    def _sound_frames(self, first: int, last: int) -> Iterator[av.VideoFrame]:
        """Decoded frames in display order, from `first` or earlier to `last`; DecodeError('corrupt') at the first
        damage.

        Damage spreads to every later frame up to the next key frame, so a damaged frame that is not wanted counts too.
        """
        index = self.index
        keys = index.key_frames[index.key_frames <= first]
        key_time = int(index.times[keys[-1] if len(keys) else 0])
        try:
            for frame in self._frames_from(key_time):
                if frame.pts is None or frame.pts < key_time:
                    continue
                if frame.is_corrupt:
                    raise DecodeError("corrupt", f"{self.media}: the frame at "
                                                 f"{float(frame.pts * index.time_base):.3f} s is damaged")
                yield frame
                if frame.pts >= index.times[last]:
                    return
        except MemoryError:  # one of PyAV's errors, but no fault of the file
            raise
        except av.error.FFmpegError as error:
            raise DecodeError("corrupt", f"{self.media}: decoding frames {first} to {last} fails: {error}") from error

    def _frames_from(self, key_time: int) -> Iterator[av.VideoFrame]:
        """Decoded frames from the key frame at `key_time` or from an earlier one on."""
        if self._begun is not None and key_time == self.index.times[0]:
            frames, self._begun = self._begun, None  # the first frame is decoded already
        else:
            self._container.seek(key_time, stream=self._stream)
            frames = self._container.decode(self._stream)
        head = next(frames, None)
        if head is None or head.pts is None or head.pts > key_time:
            # Some containers seek by stored order and land too late: go through the file from its start.
            with open_container(self.media) as again:
                yield from again.decode(video_stream(self.media, again))
            return
        yield from itertools.chain((head,), frames)

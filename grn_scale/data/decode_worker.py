"""One decoding process: requests come in on stdin, replies go out on stdout. Started by `decode_child`.

    python -m grn_scale.data.decode_worker FRAMES_FD TIMEOUT_SECONDS MEMORY_MEGABYTES

Messages are a line of JSON each. The first out is {"ready": true}; a request has a number, which its reply repeats.
The frames of a clip do not go through the pipe: they are left in the file FRAMES_FD, which both sides have open. The
process ends when stdin does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import resource
import signal
import sys
from typing import Any

import numpy as np

from grn_scale.data.decode import DecodeError, DecodeRequest, Media, decode_clip, probe

GRACE_SECONDS = 5
MEGABYTE = 1 << 20
NEARLY = 15 / 16
"""Share of the memory limit from which on a failure is put down to it: what failed to be had is not counted."""
NATIVE_REASONS = ("unreadable", "zero_frames", "truncated", "corrupt", "crashed")
"""What decoders may say where in truth they got no memory."""


class Frames:
    """The file that clips are left in, mapped; it grows as needed and is reused, which spares clearing pages."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """uint8 array of `shape` at the start of the file. It replaces the array given before."""
        size = math.prod(shape)
        if self._map is None or len(self._map) < size:
            self._map = None  # unmapped first: both together may be over the limit
            os.ftruncate(self._descriptor, size)
            try:
                self._map = mmap.mmap(self._descriptor, size)
            except OSError as error:
                raise MemoryError(f"{shape[0]} frames of {shape[1]} x {shape[2]} pixels") from error
        return np.frombuffer(self._map, np.uint8, size).reshape(shape)


def answer(request: dict[str, Any], frames: Frames) -> dict[str, Any]:
    """The reply to a request: a clip, the facts of a file, or the reason why there is none."""
    place = request.get("probe") or request["decode"]
    media = Media(place["path"], place["member"])
    try:
        if "probe" in request:
            return {"info": dataclasses.asdict(probe(media.path, media.member))}
        clip = decode_clip(DecodeRequest(**request["decode"]), frames.array)
    except DecodeError as error:
        return {"reason": error.reason, "detail": error.detail}
    except MemoryError as error:
        return {"reason": "out_of_memory", "detail": str(error)}
    except Exception as error:  # any defect a strange file finds costs one clip, and is reported with it
        return {"reason": "crashed", "detail": f"{media}: {type(error).__name__}: {error}"}
    about = {field.name: getattr(clip, field.name) for field in dataclasses.fields(clip) if field.name != "frames"}
    return {"clip": about, "shape": clip.frames.shape}


def peak_bytes() -> int:
    """Most address space the process has had; 0 where the system does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak:")), 0)
    except OSError:
        return 0


def main(frames_descriptor: int, timeout_seconds: float, memory_megabytes: int) -> None:
    """Serve requests until stdin ends."""
    # Ctrl-C reaches the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_AS)  # a site may allow less
    limit = memory_megabytes * MEGABYTE if most == resource.RLIM_INFINITY else min(memory_megabytes * MEGABYTE, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    frames = Frames(frames_descriptor)
    # Native decoders print to file descriptor 1; only messages may go to the parent.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)

        def send(message: dict[str, Any]) -> None:
            out.write(json.dumps(message).encode() + b"\n")
            out.flush()

        send({"ready": True})
        for line in sys.stdin.buffer:
            request = json.loads(line)
            # The parent kills what is late. Were it killed itself, nobody would end a decoder that hangs: the alarm
            # does, without Python's help.
            signal.alarm(math.ceil(timeout_seconds) + GRACE_SECONDS)
            reply = answer(request, frames)
            signal.alarm(0)
            spent = peak_bytes() > NEARLY * limit or reply.get("reason") == "out_of_memory"
            if spent and reply.get("reason") in NATIVE_REASONS:
                reply["reason"] = "out_of_memory"
            send({**reply, "number": request["number"], "spent": spent})


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))

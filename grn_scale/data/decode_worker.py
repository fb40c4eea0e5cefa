"""One decoding process: requests come in on stdin, frames go out on stdout. Started by `decode_pool`.

Messages are a line of JSON each; behind the line of a decoded clip follow its frames as `bytes` raw bytes. The
first message out is {"ready": true}. The process ends when stdin does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from typing import Any

from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest, decode_clip


def header_of(clip: DecodedClip) -> dict[str, Any]:
    """Everything of a clip but its pixels, as JSON values."""
    fields = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip) if f.name != "frames"}
    return {"clip": fields, "shape": clip.frames.shape, "bytes": clip.frames.nbytes}


def main() -> None:
    """Serve requests until stdin ends."""
    # Ctrl-C reaches the whole process group; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Native decoders print to file descriptor 1; only messages may go to the parent.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)

        def send(message: dict[str, Any], payload: memoryview | bytes = b"") -> None:
            out.write(json.dumps(message).encode() + b"\n")
            out.write(payload)
            out.flush()

        send({"ready": True})
        for line in sys.stdin.buffer:
            try:
                clip = decode_clip(DecodeRequest(**json.loads(line)))
            except DecodeError as error:
                send({"reason": error.reason, "detail": error.detail})
            except Exception as error:  # any defect a strange file finds costs one clip, and is reported with it
                send({"reason": "crashed", "detail": f"{type(error).__name__}: {error}"})
            else:
                send(header_of(clip), clip.frames.data.cast("B"))


if __name__ == "__main__":
    main()

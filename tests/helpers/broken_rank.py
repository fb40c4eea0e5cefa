"""`grn-scale` whose rank 1 breaks when it asks for its fourth step: `broken_rank.py hang|raise ARGUMENTS`.

Where it raises, a save of that rank is in flight, for 15 seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from grn_scale.checkpoint import background
from grn_scale.cli import main
from grn_scale.data.loader import PackLoader

honest, asked = PackLoader.__next__, []
honest_save, SLOW = background.save_checkpoint, threading.Event()


def hang() -> None:
    time.sleep(1000)


def refuse() -> None:
    SLOW.wait(10)
    raise ValueError("the shard cabinet is on fire")


def save_slowly(*arguments, **more):
    if os.environ["RANK"] == "1":
        SLOW.set()
        time.sleep(15)
    return honest_save(*arguments, **more)


def broken(self: PackLoader):
    asked.append(1)
    if len(asked) == 4 and os.environ["RANK"] == "1":
        {"hang": hang, "raise": refuse}[sys.argv[1]]()
    return honest(self)


if __name__ == "__main__":
    PackLoader.__next__ = broken
    if sys.argv[1] == "raise":
        background.save_checkpoint = save_slowly
    raise SystemExit(main(sys.argv[2:]))

"""`grn-scale` whose rank 1 breaks when it asks for its fourth step: `broken_rank.py hang|raise ARGUMENTS`."""

from __future__ import annotations

import os
import sys
import time

from grn_scale.cli import main
from grn_scale.data.loader import PackLoader

honest, asked = PackLoader.__next__, []


def hang() -> None:
    time.sleep(1000)


def refuse() -> None:
    raise ValueError("the shard cabinet is on fire")


def broken(self: PackLoader):
    asked.append(1)
    if len(asked) == 4 and os.environ["RANK"] == "1":
        {"hang": hang, "raise": refuse}[sys.argv[1]]()
    return honest(self)


if __name__ == "__main__":
    PackLoader.__next__ = broken
    raise SystemExit(main(sys.argv[2:]))

"""Processes of a job without a model, one of which goes wrong: what the watch over a run does about it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from grn_scale.command_line import run
from grn_scale.config.run_schema import WatchdogConfig
from grn_scale.errors import DoNotRequeue
from grn_scale.parallel import groups
from grn_scale.train.board import Board
from grn_scale.train.failures import errors_shared
from grn_scale.train.heartbeat import Heart
from grn_scale.train.watchdog import Watchdog

SAMPLES = [f"clip{number:02d}" for number in range(40)]


def gather(value: object) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def go_wrong(kind: str) -> None:
    """What the last rank does instead of its second step."""
    time.sleep(3)  # as long as it takes until the others know that it has begun the step
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "locked":
        ctypes.PyDLL(None).sleep(1000)  # a native function that keeps the interpreter's lock
    elif kind == "spent":
        raise DoNotRequeue("the limit is spent")
    elif kind == "stuck":
        time.sleep(1000)


def main(arguments: list[str]) -> int:
    kind, folder = arguments[0], Path(arguments[1])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    heart, board = Heart(), Board.open(groups.side_store(), rank, size, gather)
    limits = WatchdogConfig(step_seconds=3 if kind == "stuck" else 1000, heartbeat_seconds=10)
    with Watchdog(limits, folder, board, heart), errors_shared(board, heart):
        for step in (1, 2):
            heart.enter("data", step)
            heart.enter("step", step, SAMPLES)
            if step == 2 and rank == size - 1:
                go_wrong(kind)
            dist.barrier()
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))

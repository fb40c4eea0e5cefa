"""The processes of a run from when they meet until they part, and what looks after them meanwhile."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from grn_scale.config.schema import Config
from grn_scale.parallel import groups
from grn_scale.train.board import Board
from grn_scale.train.failures import errors_shared
from grn_scale.train.health import HealthFile
from grn_scale.train.heartbeat import Heart
from grn_scale.train.run_lock import run_lock
from grn_scale.train.stopping import StopRequest, deadline_of
from grn_scale.train.watchdog import Watchdog


@contextmanager
def job(config: Config) -> Iterator[tuple[torch.device, Heart, StopRequest, Callable[[], AbstractContextManager]]]:
    """Join the process groups of config.parallel, and leave them at the end.

    Gives this process's device, the heart that has to be told what the process does, the request to stop, and a context
    manager whose errors reach the others before what is around it is left. Inside, SIGTERM and SIGUSR2 only ask to
    stop, a hang ends the process (exit code 79), an error reaches all processes, and no other job trains into
    config.output.
    """
    deadline = deadline_of(config.stop, time.time())
    device, heart, folder = groups.start(config.parallel), Heart(), Path(config.output)
    board = Board.open(groups.side_store(), dist.get_rank(), dist.get_world_size(), groups.gather_objects)
    with Watchdog(config.watchdog, folder, board, heart):
        try:
            with (HealthFile(folder, board, heart) if board.rank == 0 else nullcontext(),
                  errors_shared(board, heart), StopRequest(config.stop, deadline) as stop,
                  run_lock(folder) if board.rank == 0 else nullcontext()):
                yield device, heart, stop, functools.partial(errors_shared, board, heart)
        finally:
            groups.stop()

"""A pool of processes joined in one gloo group, kept alive over many test cases (start-up is what costs)."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any


class RankFailure(AssertionError):
    """A case raised on some rank, or did not finish in time. The pool is gone."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    while (call := connection.recv()) is not None:
        name, arguments = call
        module, _, function = name.partition(":")
        try:
            connection.send((True, getattr(importlib.import_module(module), function)(**arguments)))
        except BaseException:  # whatever it is, the test that asked for it must see it
            connection.send((False, traceback.format_exc()))
        _destroy_subgroups()


def _destroy_subgroups() -> None:
    """Forget the process groups that a case has made: each has threads of its own, which add up over the cases.

    Those that `groups.start` finds and takes again stay.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    from grn_scale.parallel import groups

    if dist.is_initialized():
        kept = (dist.group.WORLD, groups._host)
        for group in [group for group in c10d._world.pg_map if group not in kept]:
            dist.destroy_process_group(group)
    gc.collect()  # engines refer to themselves, and to their groups


class RankPool:
    """`run("module:function", **arguments)` calls the function on every rank and returns what each returned."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.connections, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self.connections.append(mine)
            self.processes.append(process)

    def run(self, name: str, timeout: float = 240.0, **arguments: Any) -> list[Any]:
        for connection in self.connections:
            connection.send((name, arguments))
        results, failures = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(5.0 if failures else timeout):
                failures.append(f"rank {rank}: no answer")
                continue
            done, value = connection.recv()
            (results if done else failures).append(value if done else f"rank {rank}:\n{value}")
        if failures:
            self.close()
            raise RankFailure("\n".join(failures))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @property
    def threads(self) -> int:
        """Of the first process."""
        return len(os.listdir(f"/proc/{self.processes[0].pid}/task"))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


WORN_OUT = 300
"""Threads of a process. DeepSpeed's ZeRO-3 keeps an engine that has trained, and with it process groups whose threads
wake up a hundred times a second."""


class RankPools:
    """A pool for each number of processes, started when it is first needed, and anew where a case has killed it or many
    have worn it out."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def run(self, size: int, name: str, **arguments: Any) -> list[Any]:
        """`RankPool.run` on `size` processes."""
        if size not in self._pools or not self._pools[size].alive:
            self._pools[size] = RankPool(size)
        results = self._pools[size].run(name, **arguments)
        if self._pools[size].threads > WORN_OUT:
            self._pools[size].close()
        return results

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

"""What this machine reaches, as the planner needs it: products, attention, memory and all-reduce, while 1, 2, 4, ...
of the job's processes are at work at once."""

from __future__ import annotations

import functools
import os
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from grn_scale.atomic import write_bytes
from grn_scale.config.schema import Config, ParallelConfig
from grn_scale.perf.measure import surroundings, wait

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
LEAST_SECONDS = 2.0
"""Of work that needs no other process."""
SIGNIFICANT = 4
"""Digits of a rate; no more is known."""


@dataclass(frozen=True)
class Sizes:
    """Large enough that the rate no longer grows, small enough that it takes seconds."""

    product: int
    """Side of the matrices."""
    tokens: int
    """Of the one segment that attends to itself."""
    memory: int
    """Elements that element-wise work reads twice and writes once, in fp32."""
    message: int
    """Bytes of the large all-reduce."""


GPU = Sizes(product=8192, tokens=16384, memory=1 << 28, message=1 << 30)
CPU = Sizes(product=1024, tokens=1024, memory=1 << 24, message=1 << 24)
SMALL_MESSAGE = 4096
"""Bytes of the all-reduce whose time is all latency."""


def bench_hardware(config: Config, repeats: int) -> dict[str, Any]:
    """What a file of `grn_scale.planning.measured` holds, on each of the job's processes."""
    import torch

    from grn_scale.parallel import groups
    from grn_scale.parallel.dims import adopt_srun

    adopt_srun()
    device = groups.start(ParallelConfig())
    try:
        world = torch.distributed.get_world_size()
        hosts = groups.gather_objects(socket.gethostname())
        entries = [_Turn(config, device, hosts[:count], repeats).rates() for count in counts(world)]
        return {**_device(device), "measured": entries}
    finally:
        groups.stop()


def write_hardware(path: Path, found: dict[str, Any], about: str) -> None:
    """The file, with `about` as its first line."""
    text = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=1000)
    write_bytes(path, f"# Written by `grn-scale bench gpu --hardware`: {about}\n{text}".encode())


def counts(world: int) -> list[int]:
    """Numbers of processes to measure with: powers of two, and all."""
    return sorted({1 << power for power in range(world.bit_length())} | {world})


class _Turn:
    """The first processes of the job at work; the others wait."""

    def __init__(self, config: Config, device: torch.device, hosts: list[str], repeats: int) -> None:
        import torch

        from grn_scale.parallel import groups

        self.config, self.device, self.repeats = config, device, repeats
        self.count, self.nodes = len(hosts), len(set(hosts))
        self.sizes = GPU if device.type == "cuda" else CPU
        self.works = torch.distributed.get_rank() < self.count
        self.group = torch.distributed.new_group(range(self.count))
        self.gather = groups.gather_objects
        share = len(os.sched_getaffinity(0)) // -(-self.count // self.nodes)
        torch.set_num_threads(config.train.threads or max(1, share))

    def rates(self) -> dict[str, Any]:
        import torch

        found: dict[str, Any] = {"processes": self.count, "nodes": self.nodes}
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            found[f"matmul_{name}"] = self._rate(2 * self.sizes.product**3, self._product(dtype))
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            found[f"attention_{name}"] = self._attention(dtype)
        found["bandwidth"] = self._rate(12 * self.sizes.memory, self._sum())
        if self.count > 1:
            moved, hops = 2 * (self.count - 1) / self.count, 2 * (self.count - 1)
            # as many calls on each process, for one that waits for the others waits for ever
            large, small = (self._seconds(self._all_reduce(size), 0.0) for size in (self.sizes.message, SMALL_MESSAGE))
            found["all_reduce"], found["latency"] = _digits(moved * self.sizes.message / large), _digits(small / hops)
        return found

    def _rate(self, amount: float, prepare: Callable[[], Callable[[], object]]) -> float:
        return _digits(amount / self._seconds(prepare, LEAST_SECONDS))

    def _seconds(self, prepare: Callable[[], Callable[[], object]], least: float) -> float:
        """Of a call, mean over time and median over the processes at work. All begin together, make `repeats` calls and
        go on for `least` seconds, so that those that share a core share it while they are timed."""
        mine, work = 0.0, prepare() if self.works else None
        if work:
            work()
            wait(self.device)
        self.gather(None)
        if work:
            count, begin = 0, time.perf_counter()
            while count < self.repeats or time.perf_counter() - begin < least:
                work()
                wait(self.device)
                count += 1
            mine = (time.perf_counter() - begin) / count
        return statistics.median(self.gather(mine)[:self.count])

    def _product(self, dtype: torch.dtype) -> Callable[[], Callable[[], object]]:
        import torch

        def prepare() -> Callable[[], object]:
            a, b = (torch.randn(self.sizes.product, self.sizes.product, device=self.device, dtype=dtype)
                    for _ in range(2))
            return lambda: a @ b

        return prepare

    def _sum(self) -> Callable[[], Callable[[], object]]:
        import torch

        def prepare() -> Callable[[], object]:
            a, b, out = (torch.ones(self.sizes.memory, device=self.device) for _ in range(3))
            return lambda: torch.add(a, b, out=out)

        return prepare

    def _attention(self, dtype: torch.dtype) -> list[float]:
        """Forward and backward FLOP/s: two products of tokens x tokens x width, and five (arXiv:2307.08691,
        section 3.1)."""
        import torch

        model, tokens = self.config.model, self.sizes.tokens

        def prepare(backward: bool) -> Callable[[], object]:
            from grn_scale.model.attention import packed_attention
            from grn_scale.model.attention_kernels import attention_kernels
            from grn_scale.model.sequence import Grid, lay_out

            layout = lay_out([Grid((1, 1, tokens - 2), 1.0, 1)], "v2", model.head_size).to(self.device)
            kernels = attention_kernels(self.config.kernels.attention, self.device, dtype)
            leaves = [torch.randn(layout.length, model.num_heads, model.head_size, device=self.device, dtype=dtype,
                                  requires_grad=backward) for _ in range(3)]
            if not backward:
                return lambda: packed_attention(*leaves, layout, kernels)
            out = packed_attention(*leaves, layout, kernels)
            return lambda: torch.autograd.grad(out, leaves, out.detach(), retain_graph=True)

        once = 2 * tokens**2 * model.hidden_size
        return [self._rate(products * once, functools.partial(prepare, backward))
                for products, backward in ((2, False), (5, True))]

    def _all_reduce(self, size: int) -> Callable[[], Callable[[], object]]:
        import torch

        def prepare() -> Callable[[], object]:
            numbers = torch.zeros(size // 4, device=self.device)
            return lambda: torch.distributed.all_reduce(numbers, group=self.group)

        return prepare


def _device(device: torch.device) -> dict[str, Any]:
    """Name, and GiB for a process: of its GPU, or its share of the host's memory."""
    import torch

    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device),
                "memory_gib": _digits(torch.cuda.mem_get_info(device)[1] / GIB)}
    hardware = surroundings()["hardware"]
    share = hardware["memory_bytes"] / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {"device": f"CPU {hardware['cpu']}, {hardware['cores']} cores", "memory_gib": _digits(share / GIB)}


def _digits(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")

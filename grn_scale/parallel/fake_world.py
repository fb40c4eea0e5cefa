"""A process that takes itself for one rank of a large job: nobody to talk to, and tensors without storage.

Collectives return at once and what is received is whatever the buffer held, which is nothing; every shape, dtype and
allocation is the real one. Meant for a process of its own: libraries remember groups and environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grn_scale.config.schema import ParallelConfig
from grn_scale.parallel import groups


def fake_environment(rank: int, world_size: int) -> dict[str, str]:
    """Environment that a process needs from its start on to be that rank, on the CPU."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return os.environ | place | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@contextmanager
def fake_groups(parallel: ParallelConfig) -> Iterator[torch.device]:
    """Process groups of the world that the environment names, without anyone else in them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=int(os.environ["RANK"]),
                            world_size=int(os.environ["WORLD_SIZE"]))
    try:
        yield groups.start(parallel)
    finally:
        groups.stop()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made inside have shape, dtype and device, and no storage; real ones from outside may be read.

    A number that Python asks for is 1.0, 0 or False: no norm is infinite, nothing overflows.
    """
    apply = torch.nn.Module._apply
    torch.nn.Module._apply = _replace_tensors
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Scalars():
            yield
    finally:
        torch.nn.Module._apply = apply


class _Scalars(TorchDispatchMode):
    """Answers `item()` and `bool()`, which tensors without storage cannot."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            # what was made of a Python number is still known
            if (known := getattr(args[0], "constant", None)) is not None:
                return known.item()
            dtype = args[0].dtype
            return False if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def _replace_tensors(self: torch.nn.Module, fn: Callable[[torch.Tensor], torch.Tensor],
                     recurse: bool = True) -> torch.nn.Module:
    """`Module._apply`, the heart of `Module.to`, for fake tensors, whose contents torch cannot swap in place: a
    parameter that already fits stays the same object, another one is replaced."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            moved = fn(parameter.detach())
            if (moved.dtype, moved.device) != (parameter.dtype, parameter.device):
                self._parameters[name] = torch.nn.Parameter(moved, parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self

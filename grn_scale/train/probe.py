"""A piece of work that is the same on every process and needs no other one: how quick its device is by itself.

The times of a step cannot tell that: in them a process waits for all that it shares the model with.
"""

from __future__ import annotations

import time

import torch

REPEATS = 3
"""Of which the quickest counts: a device that is slow is so each time, one that was disturbed is not."""


class Probe:
    """Called, it gives the seconds of the work on `device`: some milliseconds of matrix products. Between calls it
    keeps 24 MB on a GPU, less on a CPU."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device, self._products = device, 40 if cuda else 4
        size, dtype = (2048, torch.bfloat16) if cuda else (256, torch.float32)
        self._matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
        self._buffers = [torch.empty_like(self._matrix) for _ in range(2)]

    def __call__(self) -> float:
        return min(self._once() for _ in range(REPEATS))

    @torch.no_grad()
    def _once(self) -> float:
        self._wait()
        begin, factor = time.perf_counter(), self._matrix
        for i in range(self._products):
            factor = torch.mm(factor, self._matrix, out=self._buffers[i % 2])
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

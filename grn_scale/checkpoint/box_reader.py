"""Reads boxes of stored tensors into memory that is there already.

The file is read, not mapped: pages of a mapped file that many ranks read parts of count as memory of each of them.
Besides the targets only one block is held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import torch

from grn_scale.checkpoint.chunks import narrow
from grn_scale.checkpoint.stored import tensor_spans
from grn_scale.checkpoint.tensor_file import flat_bytes
from grn_scale.errors import UserError

BLOCK_BYTES = 1 << 24


class BoxReader:
    """An open safetensors file; a context manager. UserError where the file is damaged, OSError where it cannot be
    read."""

    def __init__(self, path: Path) -> None:
        self.path, self.spans = path, tensor_spans(path)
        self._file = open(path, "rb", buffering=0)
        self._block = torch.empty(0, dtype=torch.uint8)

    def read(self, key: str, offset: Sequence[int], target: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Fill `target` with the box of the stored tensor that begins at `offset` and has the target's shape.

        dtype: what the tensor is stored in, if not in the target's; it is cast, block by block. A box that is cut along
        a later dimension costs the reading of the rows it lies in.
        """
        dtype = dtype or target.dtype
        span = self.spans.get(key)
        if span is None or span.dtype != dtype or len(span.shape) != target.ndim or any(
                start + length > total for start, length, total in zip(offset, target.shape, span.shape)):
            there = "is not there" if span is None else f"is {span.dtype} {list(span.shape)}"
            raise UserError(f"{key} {there}, which is not what the index says")
        self._fill(span.position, dtype, span.shape, tuple(offset), target)

    def _fill(self, position: int, dtype: torch.dtype, shape: tuple[int, ...], offset: tuple[int, ...],
              target: torch.Tensor) -> None:
        if not target.numel():
            return
        in_place = target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous()
        if in_place and _in_one_piece(shape, target.shape):
            self._read_into(target, position + dtype.itemsize * _flat(shape, offset))
            return
        row_shape = shape[1:]  # a scalar is in one piece on the host; on a device, or cast, it is a row of one
        row_bytes = math.prod(row_shape) * dtype.itemsize
        if not shape:
            target.copy_(self._rows(position, row_bytes, dtype).view(()))
            return
        position += offset[0] * row_bytes
        if row_bytes > BLOCK_BYTES:
            for i, row in enumerate(target):
                self._fill(position + i * row_bytes, dtype, row_shape, offset[1:], row)
            return
        step = BLOCK_BYTES // row_bytes
        for first in range(0, len(target), step):
            part = target[first:first + step]
            rows = self._rows(position + first * row_bytes, len(part) * row_bytes, dtype)
            part.copy_(narrow(rows.view(len(part), *row_shape), (0, *offset[1:]), part.shape))

    def _rows(self, position: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        """`size` bytes of the file as a flat tensor; it holds until the next call."""
        if self._block.numel() < size:
            self._block = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
        block = self._block[:size]
        self._read_into(block, position)
        return block.view(dtype)

    def _read_into(self, target: torch.Tensor, position: int) -> None:
        view = memoryview(flat_bytes(target).numpy())
        while view:
            count = os.preadv(self._file.fileno(), [view], position)
            if not count:
                raise UserError("it ends inside a tensor")
            view, position = view[count:], position + count

    def __enter__(self) -> BoxReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._file.close()


def _in_one_piece(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a box of `size` lies without gaps in a row-major tensor of `shape`."""
    cut = next((d for d, length in enumerate(size) if length != 1), len(size))
    return tuple(size[cut + 1:]) == tuple(shape[cut + 1:])


def _flat(shape: Sequence[int], offset: Sequence[int]) -> int:
    """Number of the element at `offset`."""
    number = 0
    for total, start in zip(shape, offset):
        number = number * total + start
    return number

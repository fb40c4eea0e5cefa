"""Host memory that a state is copied into, so that training goes on while the copy is written.

One buffer, allocated once and kept from save to save: fresh pages cost more than the copy itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from grn_scale.checkpoint.chunks import Chunk
from grn_scale.checkpoint.tensor_file import flat_bytes
from grn_scale.errors import UserError

ALIGNMENT = 64
"""Bytes at which each chunk begins: what dtypes, vector instructions and copy engines like."""

Sections = Mapping[str, Sequence[Chunk]]


def staging_bytes(sections: Sections) -> int:
    """Host memory that a background save of these chunks holds, all through the run."""
    return sum(_aligned(chunk) for chunks in sections.values() for chunk in chunks)


def _aligned(chunk: Chunk) -> int:
    return -(-chunk.tensor.nbytes // ALIGNMENT) * ALIGNMENT


class HostStaging:
    """The buffer; page-locked where there is CUDA, so that copies from the device run at full speed."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Hold at least `size` bytes from now on, every page of them touched. What was copied before is gone.

        UserError where the host has not so much memory.
        """
        if size <= self._buffer.numel():
            return
        self.release()
        try:
            self._buffer = torch.empty(size, dtype=torch.uint8)
            self._buffer.fill_(1)  # zeros may stay pages that do not exist yet
            if torch.cuda.is_available():
                # Registered rather than allocated by torch, which would round up to a power of two.
                torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self._buffer.data_ptr(), size, 0)))
        except (RuntimeError, MemoryError) as error:
            self._buffer = torch.empty(0, dtype=torch.uint8)
            raise UserError(f"no host memory for a copy of this process's state ({size / 1e9:.1f} GB): give the job "
                            "more memory, or set train.background_save=false, which saves without a copy while "
                            "training waits") from error

    def copy(self, sections: Sections) -> dict[str, list[Chunk]]:
        """The same chunks with their values in the buffer; they hold until the next call."""
        self.reserve(staging_bytes(sections))
        copies: dict[str, list[Chunk]] = {}
        position = 0
        for name, chunks in sections.items():
            copies[name] = []
            for chunk in chunks:
                source = chunk.tensor.detach()
                room = self._buffer[position:position + source.nbytes].view(source.dtype).view(source.shape)
                if source.device.type == "cpu" and source.is_contiguous():
                    # One thread is as fast as memory; torch would wait for all of its threads, tensor by tensor.
                    np.copyto(flat_bytes(room).numpy(), flat_bytes(source).numpy())
                else:
                    room.copy_(source, non_blocking=True)
                copies[name].append(replace(chunk, tensor=room))
                position += _aligned(chunk)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Give the memory back; the copies made before must not be used any more."""
        if self._buffer.numel() and torch.cuda.is_available():
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr())))
        self._buffer = torch.empty(0, dtype=torch.uint8)

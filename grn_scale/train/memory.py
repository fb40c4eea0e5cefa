"""The most memory that a process has held since it was last asked."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""What resets VmHWM (Linux, Documentation/filesystems/proc.rst)."""
KIB = 1024


@dataclass(frozen=True)
class Held:
    """Bytes of one process at its peak."""

    used: int
    """On a GPU those of tensors; without one the resident memory of the process, interpreter and libraries too."""
    reserved: int | None
    """On a GPU what torch's allocator held for them; None without one."""


class PeakMemory:
    """Called, it gives what this process held at most since the last call: on its GPU, or in the host's memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self()

    def __call__(self) -> Held:
        if self._device.type == "cuda":
            held = Held(torch.cuda.max_memory_allocated(self._device), torch.cuda.max_memory_reserved(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            return held
        return Held(_resident_peak(), None)


def summary(ranks: Sequence[Held]) -> dict[str, int | float | str]:
    """The ranks' peaks as fields of a row of metrics: least and greatest, which rank has it, and what is counted."""
    used = [rank.used for rank in ranks]
    row: dict[str, int | float | str] = {
        "peak_memory_bytes": max(used), "peak_memory_bytes_min": min(used), "peak_memory_rank": used.index(max(used)),
        "peak_memory_of": "process"}
    reserved = [rank.reserved for rank in ranks if rank.reserved is not None]
    if reserved:
        row |= {"peak_memory_of": "GPU", "peak_reserved_bytes": max(reserved)}
    return row


def _resident_peak() -> int:
    """Bytes since the last call; since the start of the process where the system does not let a process reset it."""
    try:
        found = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        CLEAR.write_text(FORGET_PEAK, encoding="ascii")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return int(found.split()[1]) * KIB

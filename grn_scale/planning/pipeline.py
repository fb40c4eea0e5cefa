"""Time that a pipeline stands idle, and how many micro-batches its first stage holds."""

from __future__ import annotations


def bubble(pp: int, vpp: int, micro_batches: int) -> float:
    """Idle time over the time of the work, (pp - 1) / (vpp x micro-batches): 1F1B, and interleaved with vpp chunks a
    stage (Narayanan et al. 2021, arXiv 2104.04473, sections 2.2.1 and 2.2.2)."""
    return (pp - 1) / (vpp * micro_batches)


def held(pp: int, vpp: int, micro_batches: int) -> float:
    """Micro-batches whose activations the first stage holds at most, each of all its layers: pp with 1F1B, and
    pp + (pp - 1) / vpp interleaved (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.3)."""
    most = pp + ((pp - 1) / vpp if vpp > 1 else 0)
    return min(most, micro_batches)

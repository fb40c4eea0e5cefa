"""A machine as `grn-scale bench gpu --hardware FILE` measured it, in place of data sheet and efficiencies.

    device: NVIDIA H100 80GB HBM3
    memory_gib: 79.1
    measured:
    - {processes: 1, nodes: 1, matmul_bf16: 6.9e+14, ...}
    - {processes: 8, nodes: 1, ..., all_reduce: 3.6e+11, latency: 9.0e-6}

Each entry was measured with so many processes at work at once, so that what they share (cores, memory, power) is in the
rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from grn_scale.config.load import build, read_mapping
from grn_scale.config.rules import require, require_positive
from grn_scale.errors import ConfigError
from grn_scale.planning.grn_machine import Machine
from grn_scale.planning.hardware import BOARD, Gpu, find_gpu, load_efficiencies

OTHER = "other"
"""Architecture of what configs/hardware/ has no file of."""


@dataclass(frozen=True)
class Rates:
    """Of one process while `processes` are at work. FLOP/s, bytes/s and seconds."""

    processes: int
    nodes: int
    matmul_bf16: float
    matmul_fp32: float
    attention_bf16: tuple[float, float]
    """Forward and backward."""
    attention_fp32: tuple[float, float]
    bandwidth: float
    """Of memory, in element-wise work."""
    all_reduce: float | None = None
    """Bus bandwidth of a large all-reduce: 2 (n - 1) / n times its bytes over its seconds; None with one process."""
    latency: float | None = None
    """Of one of the 2 (n - 1) hops of a small all-reduce."""

    def __post_init__(self) -> None:
        require_positive("measured", processes=self.processes, nodes=self.nodes, matmul_bf16=self.matmul_bf16,
                         matmul_fp32=self.matmul_fp32, bandwidth=self.bandwidth)
        linked = self.all_reduce is not None and self.latency is not None
        require(linked or self.processes == 1,
                f"measured: the entry of {self.processes} processes lacks all_reduce or latency: measure again")


@dataclass(frozen=True)
class Measured:
    """A file of measured rates."""

    device: str
    memory_gib: float
    """Of a process."""
    measured: tuple[Rates, ...]

    def __post_init__(self) -> None:
        require(bool(self.measured), "measured is empty: measure with `grn-scale bench gpu --hardware FILE`")

    def near(self, processes: int) -> Rates:
        """The entry whose number of processes is nearest."""
        return min(self.measured, key=lambda rates: abs(rates.processes - processes))

    def linked(self, kind: Callable[[Rates], bool], processes: int) -> Rates | None:
        """Of the entries of this kind that have links, the one whose number of processes is nearest."""
        return min((rates for rates in self.measured if rates.all_reduce and kind(rates)),
                   key=lambda rates: abs(rates.processes - processes), default=None)


def read_measured(path: Path) -> Measured:
    """ConfigError, naming file and key, where it is none that the benchmark wrote."""
    try:
        return build(Measured, read_mapping(path, "hardware"))
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: {error}; `grn-scale bench gpu --hardware FILE` writes such files") from error


def measured_machine(path: Path, nodes: int, per_node: int) -> Machine:
    """The machine of `nodes` x `per_node` processes. ConfigError where it has links that were not measured and that no
    data sheet tells."""
    found, reached = read_measured(path), load_efficiencies()
    rates = found.near(nodes * per_node)
    gpu = _device(found, rates).at_site(None, per_node)
    inside = found.linked(lambda entry: entry.nodes == 1, per_node)
    outside = found.linked(lambda entry: entry.nodes > 1, nodes * per_node)
    if inside:
        gpu = replace(gpu, nvlink=inside.all_reduce)
    if outside:  # a ring through several processes of each node has a card for each
        gpu = replace(gpu, nic=outside.all_reduce * outside.nodes / outside.processes)
    for needed, rate, where in ((per_node > 1, gpu.nvlink, f"{per_node} processes of a node"),
                                (nodes > 1, gpu.nic, f"{nodes} nodes")):
        if needed and not rate:
            raise ConfigError(f"{path} tells nothing of the links between {where}: measure with as many, as in "
                              f"torchrun --nproc-per-node {per_node} -m grn_scale bench gpu --hardware {path}")
    links = replace(reached, nvlink=1.0, nic=1.0, nvlink_latency=inside.latency if inside else reached.nvlink_latency,
                    nic_latency=outside.latency if outside else reached.nic_latency)
    return Machine(
        gpu, nodes, per_node, matmul=rates.matmul_bf16, attention=rates.attention_bf16, fp32=rates.matmul_fp32,
        attention_fp32=rates.attention_fp32, bandwidth=rates.bandwidth,
        # compiled kernels are for GPUs, and a CPU that sends computes no more meanwhile
        elementwise=reached.elementwise_eager if gpu.architecture == OTHER else reached.elementwise_fused,
        leak=1.0 if gpu.architecture == OTHER else reached.leak,
        waiting=reached.straggler * math.log2(nodes), reached=links,
        rates_from=f"{path.name}, measured while {rates.processes} process{'es' * (rates.processes > 1)} computed")


def _device(found: Measured, rates: Rates) -> Gpu:
    """The data sheet where the device has one. Else one whose peak is the measured rate, so that its MFU is relative to
    that, and without links."""
    try:
        sheet = find_gpu(found.device)
    except ConfigError:
        return Gpu(found.device, names=(), architecture=OTHER, memory_gib=found.memory_gib,
                   bandwidth=rates.bandwidth, bf16=max(rates.matmul_bf16, rates.matmul_fp32), fp8=None,
                   fp32=rates.matmul_fp32, watts=0.0,
                   nvlink=0.0, domain=BOARD, nic=0.0, host=rates.bandwidth)
    reached = load_efficiencies()
    return replace(sheet, memory_gib=found.memory_gib, nvlink=sheet.nvlink * reached.nvlink,
                   nic=sheet.nic * reached.nic)

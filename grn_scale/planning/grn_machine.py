"""The GPUs that a run is planned for, as the few numbers that its memory and its step time need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from grn_scale.config.schema import Config
from grn_scale.planning.communication import Group, group
from grn_scale.planning.hardware import Efficiencies, Gpu, find_gpu, load_efficiencies

GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """`nodes` equal nodes. Rates are a second, and what is reached, not what the data sheet says."""

    gpu: Gpu
    """Whose `domain` is the node, or the rack that NVLink joins."""
    nodes: int
    gpus_per_node: int
    matmul: float
    """FLOP/s of large matrix products in bf16."""
    attention: tuple[float, float]
    """FLOP/s of fused bidirectional attention, forward and backward, with 2.5 times as many FLOPs backward."""
    fp32: float
    """FLOP/s of large matrix products in fp32."""
    attention_fp32: tuple[float, float]
    bandwidth: float
    """Bytes of the GPU's memory that element-wise kernels read and write."""
    elementwise: float
    """Passes over activations, relative to those of fused kernels."""
    leak: float
    """Of the shorter of computation and communication that run beside each other, the share that adds to the time."""
    waiting: float
    """Share of a step that is added because the slowest of many nodes is waited for."""
    reached: Efficiencies
    """Of the links of `gpu`."""
    rates_from: str
    """Where the rates come from, in words."""

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> int:
        """Bytes of a GPU."""
        return int(self.gpu.memory_gib * GIB)

    @property
    def limit(self) -> int:
        """Bytes of a GPU that a plan may fill."""
        return int(self.memory * self.reached.filled)

    def group(self, ranks: int, stride: int) -> Group:
        """`ranks` ranks that are `stride` apart."""
        return group(self.gpu, self.reached, ranks, stride)

    def assumed(self) -> list[str]:
        """What the rates are, in words."""
        sheet = self.gpu
        likely = [f"no run on {sheet.name} is published: the shares of its data sheet that it reaches are those of "
                  f"{sheet.like}"] if sheet.like else []
        peak = f" (of {sheet.bf16 / 1e12:g} on the data sheet)" if sheet.names else ""
        forward, backward = (rate / 1e12 for rate in self.attention)
        return [f"{sheet.name} of {sheet.memory_gib:g} GiB: in bf16 matrix products reach {self.matmul / 1e12:.3g} "
                f"TFLOP/s{peak}, attention {forward:.3g} forward and {backward:.3g} backward ({self.rates_from})",
                *([f"those are rates of language models' programs; published image and video programs took "
                   f"{self.reached.diffusion:.2f} times as long for products and attention: `grn-scale bench gpu` "
                   "measures what yours reach"] if peak else []),
                *likely, *self._links()]

    def _links(self) -> list[str]:
        near, far = self.gpu.nvlink * self.reached.nvlink / 1e9, self.gpu.nic * self.reached.nic / 1e9
        inside = f"a process sends {near:.3g} GB/s to the {self.gpu.domain} of its node or rack"
        if self.nodes == 1:
            return [inside] if self.gpus_per_node > 1 else []
        return [f"{inside} and {far:.3g} GB/s to others; {self.waiting:.1%} of a step is added for {self.nodes} nodes "
                "that wait for each other"]


def find_machine(config: Config, gpu: str, nodes: int, gpus_per_node: int, network: float | None = None) -> Machine:
    """The machine of GPUs of that name, with the kernels of the configuration; ConfigError where nobody knows it.

    gpu: may also be a file that `grn-scale bench gpu --hardware FILE.yaml` measured, network and all; network: bytes a
    second of a GPU to other nodes (None: what is usual for it).
    """
    if gpu.endswith(".yaml"):
        from grn_scale.planning.measured import measured_machine

        return measured_machine(Path(gpu), nodes, gpus_per_node)
    sheet, reached = find_gpu(gpu).at_site(network, gpus_per_node), load_efficiencies()
    forward, backward = reached.attention[_attention(config.kernels.attention, sheet, tuple(reached.attention))]
    eager = config.kernels.compile == "never"
    return Machine(
        sheet, nodes, gpus_per_node, matmul=sheet.bf16 * reached.matmul[f"{sheet.architecture}_bf16"],
        attention=(sheet.bf16 * forward, sheet.bf16 * backward), bandwidth=sheet.bandwidth * reached.bandwidth,
        elementwise=reached.elementwise_eager if eager else reached.elementwise_fused, leak=reached.leak,
        fp32=sheet.fp32, attention_fp32=(sheet.fp32,) * 2,
        waiting=reached.straggler * math.log2(nodes), reached=reached,
        rates_from="configs/hardware/ and configs/planner/efficiencies.yaml")


def _attention(kernel: str, sheet: Gpu, known: tuple[str, ...]) -> str:
    """Which efficiency a setting of kernels.attention has on a GPU: `varlen` and `sdpa` are FlashAttention-2 there, the
    others its newest kernels."""
    newest = f"{sheet.architecture}_cudnn"
    older = f"{sheet.architecture}_fa2"
    wanted = (older, newest) if kernel in ("varlen", "sdpa") else (newest, older)
    return next(name for name in wanted if name in known)

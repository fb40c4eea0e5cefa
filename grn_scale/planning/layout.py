"""How a dense transformer is cut over GPUs, and with what software it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grn_scale.errors import ConfigError
from grn_scale.planning.shape import Shape

SHORT = 2
"""Layers that the pipeline may lack: its first and last stage have one less for embedding and head (Llama 3, arXiv
2407.21783, section 3.3.2, has 126 on 16 stages)."""


def goes_into(layers: int, chunks: int) -> bool:
    """Whether a pipeline of so many chunks takes the layers."""
    return chunks <= layers and -layers % chunks <= SHORT


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism, batch, and what is recomputed or moved to the CPU."""

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ulysses: bool = False
    """Context parallelism exchanges heads (all-to-all), not keys and values (ring)."""
    dp: int = 1
    zero: int = 1
    """Stage 0 to 3; a distributed optimizer is 1, FSDP with full sharding 3."""
    fsdp: bool = False
    """Sharded master weights in fp32 that are gathered in bf16, as PyTorch's FSDP keeps them."""
    recompute: str = "none"
    """none, selective (attention core), operators (every second matrix product) or full."""
    recompute_share: float = 1.0
    """Of the layers, how many recompute."""
    micro_batch: int = 1
    global_batch: int = 1
    """Sequences of a step."""
    offload_optimizer: bool = False
    offload_weights: bool = False
    offload_activations: bool = False
    """Of recomputed layers, the input that is kept."""
    tiled: bool = False
    """MLP and loss go through the sequence piece by piece."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "vpp", "cp", "dp", "micro_batch", "global_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.zero not in range(4):
            raise ConfigError(f"ZeRO stage {self.zero}: there are the stages 0 to 3")
        if self.recompute not in ("none", "selective", "operators", "full"):
            raise ConfigError(f"recompute {self.recompute!r}: there are none, selective, operators and full")

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batches(self) -> int:
        """Of a step, for each data-parallel rank."""
        return max(1, math.ceil(self.global_batch / (self.dp * self.micro_batch)))

    @property
    def shards(self) -> int:
        """Ranks that hold the same part of the model: data and context parallel ones."""
        return self.dp * self.cp

    def tokens(self, shape: Shape) -> float:
        """Of a micro-batch, on one GPU before tensor parallelism."""
        return self.micro_batch * shape.sequence / self.cp


@dataclass(frozen=True)
class Software:
    """What the kernels and the communication of a training program are capable of."""

    attention: str = "cudnn"
    """unfused (the scores go through memory), fa1, fa2 or cudnn."""
    fp8: bool = False
    fused: bool = True
    """Elementwise operations run as few kernels (a compiler, or hand-written ones)."""
    overlap: bool = True
    """Tensor, data and pipeline parallel communication runs beside the computation."""
    old_zero3: bool = False
    """ZeRO-3 of 2021, which reached a small part of the network."""
    dropout: bool = False
    diffusion: bool = False
    """An image or video diffusion transformer: the noise level modulates each layer, and programs reach less."""
    torch_ring: bool = False
    """Context parallelism is PyTorch's own."""
    encodes: bool = False
    """Samples are encoded by another model between steps."""
    gradient_bytes: int = 4

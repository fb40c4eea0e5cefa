"""Which implementation of the same mathematics a process runs. Nothing here changes what is learned."""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.rules import require_choice

ATTENTION = ("auto", "sdpa", "cudnn", "varlen", "flash3", "flash4", "transformer_engine")


@dataclass(frozen=True)
class KernelsConfig:
    """`grn-scale bench gpu` measures them beside each other on the GPU at hand. One that is named here and cannot be
    had stops the run at its start."""

    attention: str = "auto"
    """On a GPU. auto: cudnn (from 9.15.1 on) for segments of 1024 keys or more, varlen for the others; sdpa, cudnn:
    torch's fused attention segment by segment, of any backend or of cuDNN's; varlen: torch's kernel for many segments
    at once; flash3, flash4: the same by FlashAttention 3 or 4, where torch finds it; transformer_engine. In fp32 and on
    a CPU it is sdpa."""
    adamw: str = "torch"
    """torch (its fused AdamW), apex or transformer_engine."""
    norm: str = "torch"
    """RMS norms of the layers: torch or apex."""
    cross_entropy: str = "torch"
    """torch or apex; for model.label_form=index, because two classes need no more than a softplus."""
    compile: str = "auto"
    """Element-wise chains (norms, rotation, SwiGLU) by torch.compile: auto (on a GPU), always (a CPU needs a C++
    compiler) or never."""

    def __post_init__(self) -> None:
        require_choice("kernels.attention", self.attention, ATTENTION)
        require_choice("kernels.adamw", self.adamw, ("torch", "apex", "transformer_engine"))
        require_choice("kernels.norm", self.norm, ("torch", "apex"))
        require_choice("kernels.cross_entropy", self.cross_entropy, ("torch", "apex"))
        require_choice("kernels.compile", self.compile, ("auto", "always", "never"))

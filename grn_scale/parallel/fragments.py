"""The optimizer's fp32 state by parameter: what this rank owns of it, whatever the ZeRO stage.

DeepSpeed keeps masters and moments in flat partitions. A `Fragment` says which flat range of a local parameter
this rank owns and where it lies in the partition; with the parameter's placement it becomes boxes of official
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from grn_scale.checkpoint.chunks import Chunk, fragment_boxes, intersect, narrow
from grn_scale.parallel.placement import Placement

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    name: str
    """Local parameter."""
    shape: tuple[int, ...]
    start: int
    """First element of the flattened local parameter that this rank owns."""
    numel: int
    flat: torch.Tensor
    """fp32 tensor the optimizer steps on (a partition; the parameter itself without ZeRO)."""
    offset: int
    """Where the fragment begins in `flat`."""

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """View of the fragment in a tensor that is laid out like `flat` (master, moment)."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def seed_moments(optimizer: torch.optim.Optimizer, flats: Iterable[torch.Tensor], step: int) -> None:
    """Create the moments of AdamW, which do not exist before its first step, so that they can be restored.

    flats: the tensors it steps on.
    """
    for group in optimizer.param_groups:
        group["step"] = step  # where apex and Transformer Engine count; torch counts beside the moments
    for flat in flats:
        optimizer.state[flat] = {"step": torch.tensor(float(step), device=flat.device),
                                 **{key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}}


def fragment_chunks(fragment: Fragment, placement: Placement, values: torch.Tensor, prefix: str = "") -> list[Chunk]:
    """`values` (flat, fp32, as long as the fragment) as boxes of official parameters: views, a load fills them."""
    chunks = []
    for offset, size, start in fragment_boxes(fragment.shape, fragment.start, fragment.numel):
        box = values.narrow(0, start, math.prod(size)).view(size)
        for piece in placement.pieces:
            shared = intersect((offset, size), (piece.local_offset, piece.size))
            if shared is None:
                continue
            lower, extent = shared
            view = narrow(box, [low - o for low, o in zip(lower, offset)], extent)
            where = tuple(low - a + g for low, a, g in zip(lower, piece.local_offset, piece.global_offset))
            chunks.append(Chunk(prefix + piece.name, piece.global_shape, where, view))
    return chunks


def update_average(average: Sequence[torch.Tensor], values: Sequence[torch.Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * values, in place."""
    torch._foreach_lerp_(list(average), list(values), 1.0 - decay)

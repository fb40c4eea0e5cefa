"""The optimizer's fp32 state by parameter: what this rank owns of it, whatever the ZeRO stage.

DeepSpeed keeps masters and moments in flat partitions. A `Fragment` says which flat range of a local parameter
this rank owns and where it lies in the partition; with the parameter's placement it becomes boxes of official
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def owned_fragments(parameters: Mapping[str, torch.nn.Parameter],
                    optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """Fragments of the named local parameters that this rank owns, in name order of `parameters`."""
    flats = [group["params"] for group in optimizer.param_groups]
    fragments = []
    for name, parameter in parameters.items():
        mapping = getattr(parameter, "_hp_mapping", None)
        shape = tuple(parameter.shape)
        if mapping is not None:
            local, partition = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = next(group[0] for group in flats if _holds(group[0], mapping.hp_fragment))
            fragments.append(Fragment(name, shape, local.start, local.numel, flat, partition.start))
        elif any(parameter is member for group in flats for member in group):
            fragments.append(Fragment(name, shape, 0, parameter.numel(), parameter, 0))
    return fragments


def _holds(flat: torch.Tensor, view: torch.Tensor) -> bool:
    return flat.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def seed_moments(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Create the moments of AdamW, which do not exist before its first step, so that they can be restored."""
    for group in optimizer.param_groups:
        for flat in group["params"]:
            optimizer.state[flat] = {"step": torch.tensor(float(step)),
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


def parameter_chunks(placement: Placement, local: torch.Tensor) -> list[Chunk]:
    """A whole local parameter as boxes of official parameters (views)."""
    return [Chunk(piece.name, piece.global_shape, piece.global_offset, local[piece.local_index])
            for piece in placement.pieces]


def update_average(average: Sequence[torch.Tensor], values: Sequence[torch.Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * values, in place."""
    torch._foreach_lerp_(list(average), list(values), 1.0 - decay)

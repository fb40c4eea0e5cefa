"""Label maps of samples [D, t, h, w] <-> one flat table [P, D] over the tokens of all samples, in natural order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grn_scale.sampling.condition import Condition


def flatten_maps(maps: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """uint8 [P, D] of label maps [D, t, h, w]."""
    return torch.cat([labels.flatten(1).t() for labels in maps]).to(device, torch.uint8)


def unflatten_maps(flat_PD: torch.Tensor, conditions: Sequence[Condition], whole: bool) -> list[torch.Tensor]:
    """Map [D, t, h, w] of each sample: what was predicted or, where `whole`, with a given first frame in front."""
    thws = [condition.predicted_thw for condition in conditions]
    parts = flat_PD.split([t * h * w for t, h, w in thws])
    maps = [part.t().unflatten(1, thw) for part, thw in zip(parts, thws)]
    if not whole:
        return maps
    return [labels if c.first_frame_labels is None else torch.cat((c.first_frame_labels.to(labels), labels), dim=1)
            for labels, c in zip(maps, conditions)]

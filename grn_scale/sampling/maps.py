"""Label maps of samples [D, t, h, w] <-> tables [P, D] over their predicted tokens, in natural order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grn_scale.sampling.condition import Condition


def flatten_map(labels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 [P, D] of a label map [D, t, h, w]."""
    return labels.flatten(1).t().to(device, torch.uint8)


def unflatten_map(flat_PD: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Map [D, t, h, w] of what was predicted."""
    return flat_PD.t().unflatten(1, condition.predicted_thw)


def whole_map(flat_PD: torch.Tensor, condition: Condition) -> torch.Tensor:
    """Map [D, t, h, w] of the clip: what was predicted, with a given first frame in front."""
    labels, first = unflatten_map(flat_PD, condition), condition.first_frame_labels
    return labels if first is None else torch.cat((first.to(labels), labels), dim=1)


@dataclass(frozen=True, eq=False)
class StepMaps:
    """Samples that have just taken the same step, as an observer sees them."""

    step: int
    """Number of the step, from 0."""
    samples: tuple[int, ...]
    """Places in the call's list of conditions."""
    shares: tuple[float, ...]
    """Share of predictions in each sample's mixed map."""
    ended: frozenset[int]
    """Those of `samples` for which this was the last step."""
    _conditions: tuple[Condition, ...]
    _predicted: tuple[torch.Tensor, ...]
    _mixed: tuple[torch.Tensor, ...]

    def predictions(self) -> list[torch.Tensor]:
        """uint8 [D, t, h, w] of each sample: y, this step's prediction."""
        return list(map(whole_map, self._predicted, self._conditions))

    def mixed(self) -> list[torch.Tensor]:
        """uint8 [D, t, h, w] of each sample: x, predictions and noise, which the next step reads."""
        return list(map(whole_map, self._mixed, self._conditions))

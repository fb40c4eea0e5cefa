"""One call of the class-to-image network with guidance: both branches of the images side by side.

Legend: B images, U those of them with an unconditional branch, N tokens an image, P = B * N, D labels a token,
K classes a label, C width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grn_scale.class_to_image.model import ClassGRN


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of every token, image by image."""

    scores: torch.Tensor
    """After guidance, as `FinalLayer.scores` gives them: [P, D], or [P, D, K]."""
    conditional: torch.Tensor
    """The same without guidance."""
    hidden: torch.Tensor
    """[P + U * N, C] of the conditional branch, then of the unconditional one."""


def predict(model: ClassGRN, labels: torch.Tensor, times_B: torch.Tensor, class_B: torch.Tensor,
            guidance_B: torch.Tensor, always_both: bool = False) -> Prediction:
    """Prediction for the mixed labels, uint8 [B, D, h, w], at these signal levels (fp32, on the host).

    An image whose guidance (fp32, on the host) is 1 has no unconditional branch, unless `always_both`.
    """
    device, tokens = labels.device, model.config.tokens
    guided = torch.arange(len(guidance_B)) if always_both else (guidance_B != 1).nonzero()[:, 0]
    rows = guided.to(device)
    nothing = torch.full((len(guided),), model.config.null_class, device=device)
    times = torch.cat((times_B, times_B[guided])).to(device)
    hidden = model.hidden(torch.cat((labels, labels[rows])), times, torch.cat((class_B, nothing)))
    scores = model.final_layer.scores(hidden)
    count = len(labels) * tokens
    conditional = scores[:count]
    if not len(guided):
        return Prediction(conditional, conditional, hidden)
    asked = conditional.unflatten(0, (-1, tokens))
    weight = guidance_B[guided].to(device).view(-1, *[1] * (asked.dim() - 1))
    unconditional = scores[count:].unflatten(0, (-1, tokens))
    # At weight 1 the formula gives the conditional scores up to rounding only.
    mixed = torch.where(weight == 1, asked[rows], unconditional + weight * (asked[rows] - unconditional))
    return Prediction(asked.index_copy(0, rows, mixed).flatten(0, 1), conditional, hidden)

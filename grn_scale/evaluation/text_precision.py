"""What a model's scores lose where text states are kept as int8 with a scale a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from grn_scale.data.text_payload import dequantize, quantize
from grn_scale.model import GRN
from grn_scale.model.pack import PackedBatch


@torch.inference_mode()
def int8_text_states(model: GRN, batches: Sequence[PackedBatch]) -> dict[str, float]:
    """How far the scores of the batches' predicted tokens change when their text states pass through int8.

    relative_l2: norm of the change over the norm of the scores; largest_score_difference: over all scores. Where the
    dataset holds int8 already, they tell nothing.
    """
    change = norm = 0.0
    largest = 0.0
    for x in (batch.input for batch in batches):
        scores = model(x).double()
        difference = model(replace(x, text_TC=dequantize(*quantize(x.text_TC)).to(x.text_TC.dtype))).double() - scores
        change += difference.square().sum().item()
        norm += scores.square().sum().item()
        largest = max(largest, difference.abs().max().item()) if difference.numel() else largest
    return {"relative_l2": (change / norm) ** 0.5 if norm else 0.0, "largest_score_difference": largest}

"""Exact attention inside the samples of a packed sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from grn_scale.model.sequence import SequenceLayout

SHORT_ON_CPU = 256
"""Keys of a segment up to which an explicit softmax beats torch's CPU kernel (its bf16 backward, fourfold at 23)."""


def packed_attention(q_SHE: torch.Tensor, k_SHE: torch.Tensor, v_SHE: torch.Tensor,
                     layout: SequenceLayout) -> torch.Tensor:
    """Attention outputs [S, heads, head_size]: each row over the keys its segment may see; 0 on padding rows.

    Scale head_size^-0.5, no mask: segments of equal length run as one batched call.
    """
    if not layout.groups:
        # An empty pack: zeros that stay in the graph. A parameter without a gradient would take part neither in
        # this rank's norm nor in its collectives, and ranks would differ.
        return (q_SHE + k_SHE + v_SHE) * 0
    outputs = []
    for group in layout.groups:
        q = q_SHE[group.start:group.stop]
        if group.keys is None:
            k, v = k_SHE[group.start:group.stop], v_SHE[group.start:group.stop]
        else:
            k, v = k_SHE.index_select(0, group.keys), v_SHE.index_select(0, group.keys)
        # [count, heads, length, head_size]
        q, k, v = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in (q, k, v))
        out = _attend(q, k, v)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    outputs.append(q_SHE.new_zeros(layout.length - layout.groups[-1].stop, *q_SHE.shape[1:]))
    return torch.cat(outputs)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[count, heads, length, head_size] each; softmax in fp32."""
    if q.device.type != "cpu" or k.shape[2] > SHORT_ON_CPU:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).to(v.dtype) @ v

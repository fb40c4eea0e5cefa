"""Exact attention inside the samples of a packed sequence: which rows meet which, whatever kernel computes it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from grn_scale.model.attention_kernels import AttentionKernels, sdpa
from grn_scale.model.sequence import AttentionGroup, SequenceLayout

DEFAULT = AttentionKernels(sdpa)


def packed_attention(q_SHE: torch.Tensor, k_SHE: torch.Tensor, v_SHE: torch.Tensor, layout: SequenceLayout,
                     kernels: AttentionKernels = DEFAULT) -> torch.Tensor:
    """Attention outputs [S, heads, head_size]: each row over the keys its segment may see; 0 on padding rows.

    Scale head_size^-0.5, no mask. Segments of equal length run as one batched call; neighbours of any length as one
    call where `kernels` has a kernel for that.
    """
    if not layout.groups:
        # An empty pack: zeros that stay in the graph. A parameter without a gradient would take part neither in
        # this rank's norm nor in its collectives, and ranks would differ.
        return (q_SHE + k_SHE + v_SHE) * 0
    outputs, segment = [], 0
    for at_once, run in groupby(layout.groups, key=lambda group: kernels.at_once(group.key_length)):
        groups = list(run)
        count = sum(group.count for group in groups)
        if at_once:
            q, k, v = q_SHE[groups[0].start:groups[-1].stop], _seen(k_SHE, groups), _seen(v_SHE, groups)
            starts = (x[segment:segment + count + 1] - x[segment] for x in (layout.query_starts, layout.key_starts))
            outputs.append(kernels.many(q, k, v, *starts, max(g.length for g in groups),
                                        max(g.key_length for g in groups)))
        else:
            outputs += [_batched(q_SHE, k_SHE, v_SHE, group, kernels) for group in groups]
        segment += count
    outputs.append(q_SHE.new_zeros(layout.length - layout.groups[-1].stop, *q_SHE.shape[1:]))
    return torch.cat(outputs)


def _batched(q_SHE: torch.Tensor, k_SHE: torch.Tensor, v_SHE: torch.Tensor, group: AttentionGroup,
             kernels: AttentionKernels) -> torch.Tensor:
    # [count, heads, length, head_size]
    q, k, v = (x.unflatten(0, (group.count, -1)).transpose(1, 2) for x in
               (q_SHE[group.start:group.stop], _seen(k_SHE, [group]), _seen(v_SHE, [group])))
    return kernels.equal(q, k, v).transpose(1, 2).flatten(0, 1)


def _seen(x_SHE: torch.Tensor, groups: Sequence[AttentionGroup]) -> torch.Tensor:
    """Keys or values of neighbouring groups, segment by segment."""
    if all(group.keys is None for group in groups):
        return x_SHE[groups[0].start:groups[-1].stop]
    return torch.cat([x_SHE[group.start:group.stop] if group.keys is None else x_SHE.index_select(0, group.keys)
                      for group in groups])

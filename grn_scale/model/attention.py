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
    calls = _calls(layout.groups, kernels)
    rest = layout.length - layout.groups[-1].stop
    outputs, segment = [], 0
    # one split each: the backward pass of many slices would fill a whole tensor for each of them
    parts = zip(calls, q_SHE.split([*(groups[-1].stop - groups[0].start for groups in calls), rest]),
                _seen(k_SHE, calls), _seen(v_SHE, calls))
    for groups, q, k, v in parts:
        count = sum(group.count for group in groups)
        if kernels.at_once(groups[0].key_length):
            starts = (x[segment:segment + count + 1] - x[segment] for x in (layout.query_starts, layout.key_starts))
            outputs.append(kernels.many(q, k, v, *starts, max(g.length for g in groups),
                                        max(g.key_length for g in groups)))
        else:
            # [count, heads, length, head_size]
            equal = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))
            outputs.append(kernels.equal(*equal).transpose(1, 2).flatten(0, 1))
        segment += count
    outputs.append(q_SHE.new_zeros(rest, *q_SHE.shape[1:]))
    return torch.cat(outputs)


def _calls(groups: Sequence[AttentionGroup], kernels: AttentionKernels) -> list[list[AttentionGroup]]:
    """The groups of each call of a kernel: neighbours together where one takes segments of any lengths."""
    calls: list[list[AttentionGroup]] = []
    for at_once, run in groupby(groups, key=lambda group: kernels.at_once(group.key_length)):
        calls += [list(run)] if at_once else [[group] for group in run]
    return calls


def _seen(x_SHE: torch.Tensor, calls: Sequence[Sequence[AttentionGroup]]) -> tuple[torch.Tensor, ...]:
    """Keys or values of each call, segment by segment."""
    groups = [group for call in calls for group in call]
    if any(group.keys is not None for group in groups):
        x_SHE = x_SHE.index_select(0, torch.cat([
            torch.arange(group.start, group.stop, device=x_SHE.device) if group.keys is None else group.keys
            for group in groups]))
    sizes = [sum(group.count * group.key_length for group in call) for call in calls]
    return x_SHE.split([*sizes, len(x_SHE) - sum(sizes)])

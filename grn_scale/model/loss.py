"""Cross entropy of the true labels and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class LabelLoss(NamedTuple):
    """Sums of one packed sequence; all are linear, so slices of D and packs of a step just add up.

    A tuple, because ZeRO-3 looks for the tensors in what a module returns.
    """

    weighted: torch.Tensor
    """fp32 scalar with gradient: sum over samples of weight * mean cross entropy."""
    sample_loss_N: torch.Tensor
    """fp32 [N]: sum over labels of the cross entropy, detached."""
    sample_correct_N: torch.Tensor
    """fp32 [N]: number of labels predicted right."""


CrossEntropy = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [N, K], true classes [N] as int64) -> fp32 [N] in nats."""


def cross_entropy(logits_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """`CrossEntropy` in plain torch."""
    return F.cross_entropy(logits_NK, targets_N, reduction="none")


def label_loss(scores: torch.Tensor, targets_PD: torch.Tensor, sample_P: torch.Tensor,
               label_weight_N: torch.Tensor, entropy: CrossEntropy = cross_entropy) -> LabelLoss:
    """LabelLoss of scores as `Head` gives them ([P, D] for two classes, else [P, D, K]).

    sample_P: sample of each predicted token; label_weight_N: sample weight / (predicted tokens * D); entropy: for more
    than two classes.
    """
    if scores.dim() == 2:
        sign = 1.0 - 2.0 * targets_PD.float()
        loss = F.softplus(sign * scores)
        correct = (scores > 0) == (targets_PD > 0)
    else:
        loss = entropy(scores.flatten(0, 1), targets_PD.flatten().long()).view_as(targets_PD)
        correct = scores.argmax(dim=-1) == targets_PD
    per_token = loss.sum(dim=1)
    zeros = torch.zeros_like(label_weight_N)
    return LabelLoss(
        (per_token * label_weight_N[sample_P]).sum(),
        zeros.index_add(0, sample_P, per_token.detach()),
        zeros.index_add(0, sample_P, correct.sum(dim=1).float()))


NOISE_BINS = 10
"""Equal bins of the signal ratio p that loss and accuracy are reported in."""


def noise_bin_sums(loss: LabelLoss, ratio_N: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """fp64 [NOISE_BINS, 3]: cross entropy, right labels and labels, summed over the samples of each bin.

    ratio_N: signal ratio of each sample; labels_N: its scored labels, 0 for a sample that does not count.
    """
    bins = (ratio_N * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
    counts = (labels_N > 0).double()
    columns = torch.stack((loss.sample_loss_N * counts, loss.sample_correct_N * counts, labels_N.double()), dim=1)
    return torch.zeros(NOISE_BINS, 3, dtype=torch.float64, device=ratio_N.device).index_add(0, bins, columns)


def noise_bin_means(sums: torch.Tensor) -> dict[str, list[float | None]]:
    """What `noise_bin_sums` adds up, as means of each bin: cross entropy and share of right labels, None where the
    bin saw no label."""
    rows = sums.tolist()
    return {"loss_by_noise": [loss / labels if labels else None for loss, _, labels in rows],
            "bit_accuracy_by_noise": [correct / labels if labels else None for _, correct, labels in rows]}

"""The Inception Score (Salimans et al., "Improved techniques for training GANs", 2016), gathered batch by batch."""

from __future__ import annotations

from typing import Any

import torch

from grn_scale.errors import UserError

TOLERANCE = 1e-3
"""How far the probabilities of a sample may sum beside 1."""


class InceptionScore:
    """exp of the mean KL divergence between each sample's class probabilities and their mean, in splits.

    Which split a sample goes to follows from its number, by a fixed permutation: samples come sorted (by class or
    prompt, frame after frame), and a split of neighbours would hold a few classes alone.
    """

    def __init__(self, samples: int, splits: int) -> None:
        """samples: how many will be added in all. UserError where that is fewer than the splits."""
        if samples < splits:
            raise UserError(f"{samples} samples cannot be cut into {splits} splits; give --splits {max(1, samples)} or "
                            "fewer, or more samples")
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
        self.split = order * splits // samples
        """int64 [samples]: the split of each."""
        self.added = 0
        self.entropy = torch.zeros(splits, dtype=torch.float64)
        """Sum of p log p over the samples of each split."""
        self.marginal = torch.zeros(splits, 0, dtype=torch.float64)

    def add(self, probabilities: torch.Tensor) -> None:
        """Take in the class probabilities [n, C] of the next samples; UserError where they are none."""
        p = probabilities.to("cpu", torch.float64)
        if not torch.isfinite(p).all() or (p < 0).any() or ((p.sum(1) - 1).abs() > TOLERANCE).any():
            raise UserError("the network's class scores are no probabilities (each row must be positive and sum to 1): "
                            "if they are logits, give --score-form logits")
        if not self.marginal.shape[1]:
            self.marginal = torch.zeros(len(self.marginal), p.shape[1], dtype=torch.float64)
        split = self.split[self.added:self.added + len(p)]
        self.entropy.index_add_(0, split, torch.xlogy(p, p).sum(1))
        self.marginal.index_add_(0, split, p)
        self.added += len(p)

    def result(self) -> dict[str, Any]:
        """`mean` and `standard_deviation` over the splits, their number and the samples."""
        if self.added != len(self.split):
            raise ValueError(f"{self.added} samples were added of {len(self.split)}")
        sizes = self.split.bincount().double()
        marginal = self.marginal / sizes[:, None]
        scores = (self.entropy / sizes - torch.xlogy(marginal, marginal).sum(1)).exp()
        return {"mean": scores.mean().item(), "standard_deviation": scores.std(correction=0).item(),
                "splits": len(sizes), "samples": self.added, "classes": self.marginal.shape[1]}

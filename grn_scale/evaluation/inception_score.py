"""The Inception Score (Salimans et al., "Improved techniques for training GANs", 2016), gathered batch by batch."""

from __future__ import annotations

from typing import Any

import torch

from grn_scale.errors import UserError

TOLERANCE = 1e-3
"""How far the probabilities of a sample may sum beside 1."""


class InceptionScore:
    """exp of the mean KL divergence between each sample's class probabilities and their mean, in consecutive splits."""

    def __init__(self, samples: int, splits: int) -> None:
        """samples: how many will be added in all. UserError where that is fewer than the splits."""
        if samples < splits:
            raise UserError(f"{samples} samples cannot be cut into {splits} splits; give --splits {max(1, samples)} or "
                            "fewer, or more samples")
        self.edges = [samples * i // splits for i in range(splits + 1)]
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
        for split, (begin, end) in enumerate(zip(self.edges, self.edges[1:])):
            part = p[max(0, begin - self.added):max(0, end - self.added)]
            self.entropy[split] += torch.xlogy(part, part).sum()
            self.marginal[split] += part.sum(0)
        self.added += len(p)

    def result(self) -> dict[str, Any]:
        """`mean` and `standard_deviation` over the splits, their number and the samples."""
        if self.added != self.edges[-1]:
            raise ValueError(f"{self.added} samples were added of {self.edges[-1]}")
        sizes = torch.tensor(self.edges).diff().double()
        marginal = self.marginal / sizes[:, None]
        scores = (self.entropy / sizes - torch.xlogy(marginal, marginal).sum(1)).exp()
        return {"mean": scores.mean().item(), "standard_deviation": scores.std(correction=0).item(),
                "splits": len(sizes), "samples": self.added, "classes": self.marginal.shape[1]}

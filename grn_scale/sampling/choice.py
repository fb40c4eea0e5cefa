"""From scores to labels: probabilities, entropy, and the choice that a random number makes.

Scores are what the model's head gives: [P, D, K], or for two classes the logit difference [P, D], which is all
that their probabilities need. Legend: P predicted tokens, D labels a token, K classes a label.
"""

from __future__ import annotations

import math

import torch

WORDS = 2**32
"""Random numbers are whole, in [0, WORDS) (`keyed.hash32`)."""
LARGEST = torch.finfo(torch.float32).max


def tempered(scores: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """fp32 scores / temperature, which is one number or fp32 [P]; infinite ones become the largest finite number."""
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.view(-1, *[1] * (scores.dim() - 1))
    # The softmax of an infinite score is NaN.
    return (scores.float() / temperature).clamp(-LARGEST, LARGEST)


def probabilities(scores: torch.Tensor, temperature: float | torch.Tensor = 1.0) -> torch.Tensor:
    """fp32 [P, D, K]: softmax of scores / temperature."""
    scores = tempered(scores, temperature)
    if scores.dim() == 2:
        return torch.stack((torch.sigmoid(-scores), torch.sigmoid(scores)), dim=-1)
    return scores.softmax(dim=-1)


def choose(scores: torch.Tensor, temperature: float | torch.Tensor, random_PD: torch.Tensor) -> torch.Tensor:
    """uint8 [P, D]: the class that each random number (int64) falls on, classes weighted by their probability."""
    if scores.dim() == 2:
        # In float64 the product with 2^32 is exact.
        threshold = (torch.sigmoid(tempered(scores, temperature)).double() * WORDS).long()
        return (random_PD < threshold).to(torch.uint8)
    below = probabilities(scores, temperature).double().cumsum(dim=-1)[..., :-1]
    return (random_PD[..., None] >= (below * WORDS).long()).sum(dim=-1).to(torch.uint8)


def relative_entropy(scores: torch.Tensor) -> torch.Tensor:
    """fp32 [P, D] in [0, 1]: entropy / log K of the prediction; 0, never NaN, where a probability underflows."""
    p = probabilities(scores)
    return torch.special.entr(p).sum(dim=-1) / math.log(p.shape[-1])

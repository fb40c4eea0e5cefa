"""Training's corruption: which labels of a sample stay true, and what the others become.

Every number is keyed by (seed, draw index, label index), so that it is the same on any layout and device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from grn_scale import keyed
from grn_scale.config.schema import NoiseConfig
from grn_scale.model.sequence import SequenceLayout


def shift_ratio(p: float, alpha: float) -> float:
    """Signal ratio moved towards noise for alpha > 1 (values above 1000 mean alpha - 1000; reference, section 5)."""
    if alpha > 1000:
        alpha -= 1000
    noise = 1.0 - p
    return 1.0 - alpha * noise / (1.0 + (alpha - 1.0) * noise)


def signal_ratio(seed: int, draw: int, noise: NoiseConfig) -> float:
    """Share p of true labels this draw is corrupted to: sigmoid of a normal number, or uniform for sigma 0."""
    if noise.sigma > 0:
        z = noise.mean + noise.sigma * keyed.normal(seed, "signal ratio", draw)
        p = 1.0 / (1.0 + math.exp(-z))
    else:
        p = keyed.uniform(seed, "signal ratio", draw)
    return shift_ratio(p, noise.shift)


def corrupt(labels_VD: torch.Tensor, layout: SequenceLayout, ratios: Sequence[float], draws: Sequence[int],
            seed: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mixed labels uint8 [V, D], realised share of kept labels fp32 [N]).

    A label stays with probability p, else it becomes uniformly random (and may hit the truth). The share is
    counted over all frames of a sample; a given first frame stays clean nevertheless.
    """
    device, (_, channels) = labels_VD.device, labels_VD.shape
    def keys(purpose: str) -> torch.Tensor:
        values = [keyed.as_int64(keyed.key64(seed, purpose, draw)) for draw in draws]
        return torch.tensor(values, dtype=torch.int64, device=device)[layout.visual_sample, None]

    counter = layout.visual_index[:, None] * channels + torch.arange(channels, device=device)
    threshold = torch.tensor([math.floor(p * 2**32) for p in ratios], dtype=torch.int64, device=device)
    keep = keyed.hash32(keys("keep"), counter) < threshold[layout.visual_sample, None]
    noise = keyed.hash32(keys("noise"), counter) >> (32 - classes.bit_length() + 1)
    kept = torch.zeros(len(draws), dtype=torch.int64, device=device).index_add(0, layout.visual_sample, keep.sum(dim=1))
    tokens = torch.zeros_like(kept).index_add(0, layout.visual_sample, torch.ones_like(layout.visual_sample))
    share = (kept.double() / (tokens * channels).clamp(min=1)).float()

    scored = torch.zeros(labels_VD.shape[0], dtype=torch.bool, device=device)
    scored[layout.predicted] = True
    mixed = torch.where(keep | ~scored[:, None], labels_VD, noise.to(torch.uint8))
    return mixed, share

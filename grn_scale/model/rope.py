"""Rotary position embedding over time, height and width (GRN reference, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BASE = 10_000.0
SPAN_AREA = 225 * 75
"""Height x width that every resolution's positions are spread over."""
VISUAL_TIME_OFFSET = 600
LEVEL_TIME = 512


def spatial_positions(height: int, width: int, ratio_key: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of the rows [height] and columns [width] of a latent grid, int64.

    ratio_key: the bucket's height/width template, which fixes the span so that every resolution of one
    aspect ratio covers the same range.
    """
    span_width = int(math.sqrt(SPAN_AREA / ratio_key))
    span_height = int(ratio_key * math.sqrt(SPAN_AREA / ratio_key))
    # torch.round rounds half to even, in float32 as the reference does.
    rows = torch.round(torch.arange(height, dtype=torch.float32) * (span_height / height)).long()
    columns = torch.round(torch.arange(width, dtype=torch.float32) * (span_width / width)).long()
    return rows, columns


def visual_positions(frames: Sequence[int], height: int, width: int, ratio_key: float) -> torch.Tensor:
    """int64 [len(frames) * height * width, 3]: (time, height, width) of visual tokens, row-major."""
    rows, columns = spatial_positions(height, width, ratio_key)
    time = torch.tensor(list(frames), dtype=torch.int64) + VISUAL_TIME_OFFSET
    grid = torch.meshgrid(time, rows, columns, indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in grid], dim=1)


def time_positions(times: torch.Tensor) -> torch.Tensor:
    """int64 [n, 3]: positions of text and noise-level tokens, which lie on the time axis."""
    return torch.stack([times, torch.zeros_like(times), torch.zeros_like(times)], dim=1)


def rotary_angles(positions: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each fp32 [S, head_size / 2], of positions [S, 3].

    The first floor(half/3) pairs turn by time, as many by height, the rest by width; each group has its own
    frequencies 10000^(-j/n).
    """
    half = head_size // 2
    third = half // 3
    angles = []
    for axis, count in enumerate((third, third, half - 2 * third)):
        exponent = torch.arange(count, dtype=torch.float32, device=positions.device) / max(count, 1)
        angles.append(positions[:, axis, None].float() * (1.0 / BASE**exponent))
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()


def rotate(x_SHE: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys [S, heads, head_size] with every pair (2j, 2j+1) turned, in fp32, in the dtype of x."""
    x, y = x_SHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2).to(x_SHE.dtype)

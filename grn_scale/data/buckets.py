"""Resolution buckets: which height and width a clip is resized to, and how many of its frames are kept.

A bucket is one aspect ratio out of a fixed set of templates at one pixel budget. The budget is given by the side
of a square clip in latent cells (`latent_side`); the ratio then spreads the same area over height and width.
Source: GRN reference, section 5 "Resolution table"; tests/golden/resolution_table.json holds the official rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CELL_PIXELS = 16
"""Pixels a latent cell spans in height and width (the tokenizer's spatial stride)."""
GROUP_FRAMES = 4
"""Frames each latent after the first stands for (the tokenizer's temporal stride)."""

_LANDSCAPE_INVERSES = (3, 5 / 2, 2, 16 / 9, 3 / 2, 4 / 3, 1.16)
RATIOS = (*(1 / r for r in _LANDSCAPE_INVERSES), 1.0, *reversed(_LANDSCAPE_INVERSES))
"""Height / width templates, ascending."""


def _key(ratio: float) -> float:
    return math.floor(ratio * 1000) / 1000


_EXACT = {_key(ratio): ratio for ratio in RATIOS}
RATIO_KEYS = tuple(_EXACT)
"""The templates cut to three decimals, ascending: the names that samples and weights go by."""


@dataclass(frozen=True)
class Bucket:
    """Size that clips of one bucket are resized and cropped to."""

    height: int
    """Pixels, a multiple of 16."""
    width: int
    """Pixels, a multiple of 16."""
    ratio_key: float
    """Template of height / width; spans the rotary positions."""

    @property
    def grid(self) -> tuple[int, int]:
        """Latent cells, (height, width)."""
        return self.height // CELL_PIXELS, self.width // CELL_PIXELS


def nearest_ratio_key(height: float, width: float) -> float:
    """Template key nearest to height / width of a source; the larger one where two are equally near."""
    ratio = height / width
    # The official table lists the templates from tall to wide and takes the first of equals.
    return min(reversed(RATIO_KEYS), key=lambda key: abs(key - ratio))


def bucket(ratio_key: float, latent_side: int) -> Bucket:
    """Bucket of a template at a pixel budget. ValueError where `ratio_key` is no template or the side not positive."""
    if ratio_key not in _EXACT:
        raise ValueError(f"ratio key {ratio_key} is none of {', '.join(map(str, RATIO_KEYS))}")
    if latent_side < 1:
        raise ValueError(f"latent side is {latent_side}, but must be at least 1")
    ratio = _EXACT[ratio_key]
    width = math.sqrt(latent_side**2 / ratio)
    return Bucket(round(width * ratio) * CELL_PIXELS, round(width) * CELL_PIXELS, ratio_key)


def choose_bucket(height: float, width: float, latent_side: int) -> Bucket:
    """Bucket for a source of this height and width (any unit: only their ratio counts)."""
    return bucket(nearest_ratio_key(height, width), latent_side)


def whole_groups(frames: int) -> int:
    """Largest 1 + 4k that is at most `frames`: the clip lengths that the tokenizer takes. 0 for no frame."""
    return 0 if frames < 1 else frames - (frames - 1) % GROUP_FRAMES


def latent_frames(frames: int) -> int:
    """Latents of a clip of 1 + 4k frames: 1 + k."""
    return (frames - 1) // GROUP_FRAMES + 1

"""What a clip of a moving shape shows, told from its pixels alone: colour and direction.

Nothing is learned, so that the score of a model cannot drift with its judge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grn_scale.demo.shapes import COLORS, DIRECTIONS

FOREGROUND_DISTANCE = 60.0
"""RGB distance to the background from which on a pixel belongs to the shape."""
LEAST_SHARE = 0.01
"""Share of a frame that a shape covers at least."""
LEAST_MOTION = 0.1
"""Way of the centroid over the clip, in units of the frame's side, that counts as motion."""


@dataclass(frozen=True)
class Detection:
    """None where nothing can be told."""

    color: str | None
    direction: str | None


def detect(frames: np.ndarray) -> Detection:
    """Colour and direction of the shape in a clip, uint8 RGB [T, height, width, 3].

    The background is the median of the frames' borders, the shape what differs from it. The colour is the one nearest
    to the mean of the shape's pixels, each weighted by its distance from the background (its edge is a mixture of
    both); the direction is that of a line through the centroids.
    """
    pixels = frames.astype(np.float32)
    border = np.concatenate([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1)
    distance = np.linalg.norm(pixels - np.median(border.reshape(-1, 3), axis=0), axis=-1)
    weight = np.where(distance > FOREGROUND_DISTANCE, distance, 0)
    visible = (weight > 0).mean(axis=(1, 2)) >= LEAST_SHARE
    if not visible.any():
        return Detection(None, None)
    mean = (pixels * weight[..., None]).sum(axis=(0, 1, 2)) / weight.sum()
    color = min(COLORS, key=lambda name: np.linalg.norm(mean - COLORS[name]))
    return Detection(color, _direction(weight[visible], np.flatnonzero(visible), len(frames)))


def _direction(weight: np.ndarray, times: np.ndarray, frames: int) -> str | None:
    """Name of the axis the centroid of weight [n, height, width] moves along, seen at `times` of a clip."""
    if len(times) < 2:
        return None
    n, height, width = weight.shape
    total = weight.sum(axis=(1, 2))
    x = (weight.sum(axis=1) @ (np.arange(width) + 0.5)) / total / width
    y = (weight.sum(axis=2) @ (np.arange(height) + 0.5)) / total / height
    way = np.array([np.polyfit(times, values, 1)[0] * (frames - 1) for values in (x, y)])
    if np.abs(way).max() < LEAST_MOTION:
        return None
    return max(DIRECTIONS, key=lambda name: way @ DIRECTIONS[name])

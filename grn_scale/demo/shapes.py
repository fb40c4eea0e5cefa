"""Captioned moving shapes: clips whose truth is known, rendered from attributes and a seed.

Six colours, four shapes, four directions, four backgrounds and two sizes make 768 combinations. One in six is held
out of every training set (`held_out`), so that an evaluation can ask for combinations never seen together.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from grn_scale import keyed
from grn_scale.errors import UserError

COLORS = {"red": (230, 30, 30), "green": (30, 190, 50), "blue": (35, 60, 230),
          "yellow": (240, 220, 30), "magenta": (225, 40, 215), "cyan": (30, 215, 225)}
"""RGB of the shapes."""
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Motion as (x, y), y growing downwards."""
BACKGROUNDS = {"black": (12, 12, 12), "white": (243, 243, 243), "gray": (128, 128, 128), "brown": (96, 56, 24)}
SIZES = {"small": 0.14, "large": 0.22}
"""Half the extent of a shape, as a fraction of the frame's side."""

_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Attributes:
    """What a clip shows; `caption` says it in words."""

    size: str
    color: str
    shape: str
    direction: str
    background: str

    def __post_init__(self) -> None:
        for name, valid in (("size", SIZES), ("color", COLORS), ("shape", SHAPES), ("direction", DIRECTIONS),
                            ("background", BACKGROUNDS)):
            if getattr(self, name) not in valid:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(valid)}")

    @property
    def caption(self) -> str:
        """Like "small red circle moving left on black"."""
        return f"{self.size} {self.color} {self.shape} moving {self.direction} on {self.background}"


@functools.cache
def combinations() -> tuple[Attributes, ...]:
    """All 768, in a fixed order."""
    return tuple(Attributes(*values) for values in itertools.product(SIZES, COLORS, SHAPES, DIRECTIONS, BACKGROUNDS))


@functools.cache
def held_out() -> frozenset[Attributes]:
    """128 combinations no training clip shows, the same for ever: those of the lowest keyed hash."""
    ranked = sorted(combinations(), key=lambda a: keyed.key64("held-out shapes", a.caption))
    return frozenset(ranked[:len(ranked) // 6])


@functools.cache
def training() -> tuple[Attributes, ...]:
    """The other 640 combinations, in a fixed order."""
    return tuple(a for a in combinations() if a not in held_out())


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """True where (x, y), in units of half the extent and y growing downwards, lies in the shape."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.8) & (np.abs(x) <= (y + 1) / 1.8)
    near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return (near <= 0.36) & (far <= 1)


def path(attributes: Attributes, seed: int, frames: int) -> np.ndarray:
    """Centre of the shape in each frame, float64 [frames, 2] as (x, y) in units of the frame's side.

    The shape stays fully inside; over the clip it covers at least 70 % of the way there is room for.
    """
    key = ("shapes", seed, attributes.caption)
    margin = SIZES[attributes.size] + 0.04
    room = 1 - 2 * margin
    length = room * (0.7 + 0.25 * keyed.uniform(*key, "length"))
    start = margin + (room - length) * keyed.uniform(*key, "start")
    along = start + length * np.linspace(0, 1, frames) if frames > 1 else np.array([start])
    across = np.full(frames, margin + room * keyed.uniform(*key, "across"))
    dx, dy = DIRECTIONS[attributes.direction]
    if dx + dy < 0:
        along = 1 - along
    return np.stack([along, across] if dx else [across, along], axis=1)


def render(attributes: Attributes, seed: int, side: int = 32, frames: int = 9) -> np.ndarray:
    """uint8 RGB clip [frames, side, side, 3], anti-aliased. The same arguments give the same bytes.

    `seed` moves the start, the speed and the lane of the shape; attributes fix all else.
    """
    if side < 16 or frames < 1:
        raise UserError(f"side is {side} and frames is {frames}, but a clip needs at least 16 pixels and 1 frame")
    half = SIZES[attributes.size]
    fine = (np.arange(side * _SUPERSAMPLING) + 0.5) / (side * _SUPERSAMPLING)
    background = np.array(BACKGROUNDS[attributes.background], np.float32)
    color = np.array(COLORS[attributes.color], np.float32)
    clip = np.empty((frames, side, side, 3), np.uint8)
    for frame, (x, y) in enumerate(path(attributes, seed, frames)):
        inside = _inside(attributes.shape, ((fine - x) / half)[None, :], ((fine - y) / half)[:, None])
        cover = inside.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING).mean((1, 3), dtype=np.float32)[..., None]
        clip[frame] = np.rint(background + (color - background) * cover)
    return clip

"""What happens to frames before a network of the user's sees them. Every number of it is recorded with the result."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from grn_scale.errors import ConfigError

MODES = ("bilinear", "bicubic")
RANGES = {"0..255": (0.0, 255.0), "0..1": (0.0, 1.0), "-1..1": (-1.0, 1.0)}
CLIP_FRAMES = 16
"""What the field compares videos by."""


@dataclass(frozen=True)
class Preprocessing:
    """From 8-bit frames to the network's input."""

    input: str = "images"
    """images: every frame is a sample; clips: the first frames of a file together are one."""
    frame_every: int = 1
    """Of images: every which frame is taken, from the first on."""
    clip_frames: int = CLIP_FRAMES
    """Of clips: how many frames are taken."""
    resize: tuple[int, int] | None = None
    """Height and width the frames are stretched to, antialiased; None: as they are."""
    resize_mode: str = "bilinear"
    value_range: str = "0..255"
    """Where black and white lie."""
    mean: tuple[float, ...] | None = None
    """Subtracted from each channel (RGB), in value_range."""
    std: tuple[float, ...] | None = None
    """What each channel is divided by after that."""

    @property
    def most_frames(self) -> int | None:
        """How many of a file's first frames are needed at most; None for all."""
        return self.clip_frames if self.input == "clips" else None

    def pick(self, frames: np.ndarray) -> np.ndarray | None:
        """Samples out of a file's frames [T, H, W, 3]: [n, H, W, 3] images, or [1, clip_frames, H, W, 3].

        A copy: while it waits for its batch, the rest of the file is let go. None where the file is shorter than
        clip_frames.
        """
        if self.input == "images":
            return frames[::self.frame_every].copy()
        return frames[None, :self.clip_frames].copy() if len(frames) >= self.clip_frames else None

    @torch.inference_mode()
    def __call__(self, samples: np.ndarray, device: torch.device) -> torch.Tensor:
        """fp32 [n, 3, H, W] of images, or [n, 3, T, H, W] of clips, uint8 [n, (T,) H, W, 3]."""
        frames = torch.from_numpy(np.ascontiguousarray(samples)).to(device).movedim(-1, -3).float()
        shape = frames.shape
        frames = frames.reshape(-1, *shape[-3:])
        if self.resize is not None and self.resize != tuple(shape[-2:]):
            frames = torch.nn.functional.interpolate(frames, self.resize, mode=self.resize_mode, align_corners=False,
                                                     antialias=True).clamp_(0, 255)
        low, high = RANGES[self.value_range]
        frames = frames * ((high - low) / 255) + low
        if self.mean is not None:
            frames = frames - frames.new_tensor(self.mean)[:, None, None]
        if self.std is not None:
            frames = frames / frames.new_tensor(self.std)[:, None, None]
        frames = frames.reshape(*shape[:-2], *frames.shape[-2:])
        return frames if self.input == "images" else frames.transpose(1, 2).contiguous()

    def settings(self) -> dict[str, Any]:
        """Plain values, without those that do not act."""
        taken = {"frame_every": self.frame_every} if self.input == "images" else {"clip_frames": self.clip_frames}
        return {"input": self.input, **taken, "resize": self.resize and list(self.resize),
                "resize_mode": self.resize and self.resize_mode, "value_range": self.value_range,
                "mean": self.mean and list(self.mean), "std": self.std and list(self.std)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `of_options` reads."""
    parser.add_argument("--input", choices=("images", "clips"), default="images", help="what the network takes: frames "
                        "as pictures [N, 3, H, W], or clips [N, 3, T, H, W] (default: images)")
    parser.add_argument("--frame-every", type=int, default=1, metavar="N",
                        help="of images: take every N-th frame of a file (default: 1)")
    parser.add_argument("--clip-frames", type=int, default=CLIP_FRAMES, metavar="N",
                        help=f"of clips: take the first N frames of a file (default: {CLIP_FRAMES})")
    parser.add_argument("--resize", metavar="HxW|none", help="stretch frames to this size (default: none for a "
                        "TorchScript file, the training size of a torchvision network)")
    parser.add_argument("--resize-mode", choices=MODES, help="(default: bilinear); antialiased")
    parser.add_argument("--value-range", choices=tuple(RANGES), help="where black and white lie (default: 0..255 for a "
                        "TorchScript file, 0..1 for a torchvision network; write --value-range=-1..1)")
    parser.add_argument("--mean", metavar="R,G,B|none", help="subtract this after that (default: none for a "
                        "TorchScript file, what a torchvision network was trained with)")
    parser.add_argument("--std", metavar="R,G,B|none", help="divide by this after that (default: as for --mean)")


def of_options(options: argparse.Namespace, default: Preprocessing) -> Preprocessing:
    """`default` with what the options say; ConfigError where they make no sense."""
    for name in ("frame_every", "clip_frames"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    changes: dict[str, Any] = {"input": options.input, "frame_every": options.frame_every,
                               "clip_frames": options.clip_frames}
    if options.resize is not None:
        changes["resize"] = None if options.resize == "none" else pixels("--resize", options.resize)
    for name in ("resize_mode", "value_range"):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    for name in ("mean", "std"):
        if getattr(options, name) is not None:
            changes[name] = _channels(f"--{name}", getattr(options, name))
    if changes.get("std") and min(changes["std"]) <= 0:
        raise ConfigError(f"--std is {options.std}, but each number must be greater than 0")
    return replace(default, **changes)


def pixels(option: str, text: str) -> tuple[int, int]:
    """(height, width) of a text like 299x299; ConfigError for another."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or "0" in (match[1].lstrip("0") or "0", match[2].lstrip("0") or "0"):
        raise ConfigError(f"{option} is {text!r}, but must be height x width in pixels, like 299x299")
    return int(match[1]), int(match[2])


def _channels(option: str, text: str) -> tuple[float, ...] | None:
    if text == "none":
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}, but must be three numbers, like 0.485,0.456,0.406") from error
    if len(values) != 3 or not np.isfinite(values).all():
        raise ConfigError(f"{option} is {text!r}, but must be three finite numbers, one for each of R, G and B")
    return values

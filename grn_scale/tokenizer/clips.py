"""Clips of 8-bit frames in and out of a video tokenizer, and how much of them survives.

Legend: B clips, T frames, H and W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from grn_scale.hbq import quantize_bits, to_token_major
from grn_scale.tokenizer.video import VideoTokenizer

PIECE_FRAMES = 32
"""Clips of more than one frame above this are encoded in pieces of so many (whole groups of four), so that memory stays
bounded: only the frames as bytes are there at full length."""


def to_video(frames: np.ndarray) -> torch.Tensor:
    """fp32 [B, 3, T, H, W] in [-1, 1] of uint8 RGB frames [B, T, H, W, 3], channels last in memory."""
    video = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    return video.contiguous(memory_format=torch.channels_last_3d)


def to_frames(video: torch.Tensor) -> np.ndarray:
    """uint8 RGB [B, T, H, W, 3] of a decoded video [B, 3, T, H, W] around [-1, 1]; truncated as in the reference."""
    pixels = ((video.float() + 1) / 2).clamp_(0, 1).mul_(255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


@torch.inference_mode()
def encode_features(tokenizer: VideoTokenizer, frames: np.ndarray) -> torch.Tensor:
    """fp32 features [B, d, t, h, w] of uint8 frames [B, T, H, W, 3], on the tokenizer's device."""
    parameter = next(tokenizer.parameters())
    cuts = range(PIECE_FRAMES + 1, frames.shape[1], PIECE_FRAMES)
    pieces = (to_video(piece).to(parameter.device, parameter.dtype) for piece in np.split(frames, cuts, axis=1))
    if not cuts:
        return tokenizer.encode(next(pieces)).float()
    return torch.cat([features.float() for features in tokenizer.encode_stream(pieces)], 2)


def encode_frames(tokenizer: VideoTokenizer, frames: np.ndarray, rounds: int) -> list[torch.Tensor]:
    """Bits of each clip, uint8 [t, h, w, rounds * latent_channels] on the CPU, of uint8 frames [B, T, H, W, 3]."""
    return list(to_token_major(quantize_bits(encode_features(tokenizer, frames), rounds)).cpu().unbind())


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames; infinite where they are equal."""
    error = np.mean((frames.astype(np.float64) - truth.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf

"""Clips of 8-bit frames in and out of a video tokenizer, and how much of them survives.

Legend: B clips, T frames, H and W pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from grn_scale.hbq import quantize_bits, to_token_major
from grn_scale.tokenizer.video import VideoTokenizer

WHOLE_CLIP_FRAMES = 33
"""Longer clips are encoded in pieces of PIECE_GROUPS groups of four frames, so that memory stays bounded."""
PIECE_GROUPS = 8


def to_video(frames: np.ndarray) -> torch.Tensor:
    """fp32 [B, 3, T, H, W] in [-1, 1] of uint8 RGB frames [B, T, H, W, 3], channels last in memory."""
    video = torch.from_numpy(frames).movedim(-1, 1).float() / 127.5 - 1
    return video.contiguous(memory_format=torch.channels_last_3d)


def to_frames(video: torch.Tensor) -> np.ndarray:
    """uint8 RGB [B, T, H, W, 3] of a decoded video [B, 3, T, H, W] around [-1, 1]; truncated as in the reference."""
    pixels = ((video.float() + 1) / 2).clamp_(0, 1).mul_(255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()


@torch.inference_mode()
def encode_frames(tokenizer: VideoTokenizer, frames: np.ndarray, rounds: int) -> list[torch.Tensor]:
    """Bits of each clip, uint8 [t, h, w, rounds * latent_channels] on the CPU, of uint8 frames [B, T, H, W, 3]."""
    parameter = next(tokenizer.parameters())
    video = to_video(frames).to(parameter.device, parameter.dtype)
    if video.shape[2] <= WHOLE_CLIP_FRAMES:
        features = tokenizer.encode(video)
    else:
        features = tokenizer.encode_chunked(video, PIECE_GROUPS)
    return list(to_token_major(quantize_bits(features.float(), rounds)).cpu().unbind())


def psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames; infinite where they are equal."""
    error = np.mean((frames.astype(np.float64) - truth.astype(np.float64)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf

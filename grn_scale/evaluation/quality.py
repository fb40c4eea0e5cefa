"""What the video tokenizer does to a clip: PSNR and SSIM of encode -> quantise -> decode, by rounds of HBQ kept.

Legend: T frames, t latents, M rounds, d latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from grn_scale.errors import UserError
from grn_scale.hbq import dequantize_bits, quantize_bits
from grn_scale.sampling.video import BATCH_CELLS
from grn_scale.tokenizer.clips import encode_features, to_frames
from grn_scale.tokenizer.video import VideoTokenizer


@dataclass(frozen=True)
class Quality:
    """How near a clip is to what it was."""

    psnr_db: float
    """Over all pixels of the clip, 8 bits; infinite where nothing differs."""
    ssim: float | None
    """Mean over its frames; None where it was not asked for."""


@torch.inference_mode()
def decode_bits(tokenizer: VideoTokenizer, bits: torch.Tensor, rounds: int) -> Iterator[np.ndarray]:
    """uint8 frames [n, H, W, 3], piece after piece, of bits [1, rounds * d, t, h, w]."""
    parameter = next(tokenizer.parameters())
    features = dequantize_bits(bits, rounds).to(parameter.device, parameter.dtype)
    pieces = features.split(1, dim=2) if features[0, 0].numel() > BATCH_CELLS else [features]
    for video in tokenizer.decode_stream(pieces):
        yield to_frames(video)[0]


def reconstruct(tokenizer: VideoTokenizer, frames: np.ndarray, rounds: int) -> np.ndarray:
    """uint8 frames [T, H, W, 3] as they come back from `rounds` rounds of HBQ."""
    bits = quantize_bits(encode_features(tokenizer, frames[None]), rounds)
    return np.concatenate(list(decode_bits(tokenizer, bits, rounds)))


def quality_by_round(tokenizer: VideoTokenizer, frames: np.ndarray, rounds: int) -> list[Quality]:
    """Quality of uint8 frames [T, H, W, 3] after the first 1, 2, ... `rounds` rounds of one quantisation."""
    bits = quantize_bits(encode_features(tokenizer, frames[None]), rounds)
    width = tokenizer.latent_channels
    return [compare(decode_bits(tokenizer, bits[:, :kept * width], kept), frames, ssim=True)
            for kept in range(1, rounds + 1)]


def quality(tokenizer: VideoTokenizer, frames: np.ndarray, rounds: int) -> Quality:
    """PSNR of uint8 frames [T, H, W, 3] after all rounds, without the SSIM (which needs scikit-image)."""
    bits = quantize_bits(encode_features(tokenizer, frames[None]), rounds)
    return compare(decode_bits(tokenizer, bits, rounds), frames, ssim=False)


def compare(pieces: Iterator[np.ndarray], truth: np.ndarray, *, ssim: bool) -> Quality:
    """Quality of consecutive pieces uint8 [n, H, W, 3] that together are as long as `truth`, uint8 [T, H, W, 3]."""
    squares, similarity, done = 0, 0.0, 0
    for piece in pieces:
        wanted = truth[done:done + len(piece)]
        # Integers: the sum is exact, whatever the pieces.
        squares += int(np.square(piece.astype(np.int32) - wanted).sum(dtype=np.int64))
        if ssim:
            similarity += frame_ssim(piece, wanted).sum().item()
        done += len(piece)
    if done != len(truth):
        raise ValueError(f"{done} frames are compared with {len(truth)}")
    psnr = 10 * math.log10(255**2 * truth.size / squares) if squares else math.inf
    return Quality(psnr, similarity / done if ssim else None)


def frame_ssim(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """fp64 SSIM [n] of each frame, uint8 [n, H, W, 3], against the true one.

    Gaussian window of 11 pixels (sigma 1.5), K1 0.01, K2 0.03, mean over the RGB channels, without the border of half a
    window: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004; as
    scikit-image computes it. Both sides must be at least 11.
    """
    metric = load_ssim()
    return np.array([metric(found, wanted, data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5,
                            use_sample_covariance=False) for found, wanted in zip(frames, truth, strict=True)])


def load_ssim() -> Callable[..., float]:
    """scikit-image's function; UserError saying how to install it where it is missing."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError(f"SSIM needs scikit-image ({error}); pip install \"grn-scale[evaluate]\"") from error
    return structural_similarity

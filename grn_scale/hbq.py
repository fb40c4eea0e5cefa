"""Hierarchical binary quantisation: latent features <-> labels <-> bytes (GRN reference, section 1).

Round m of M halves the step: b_m = (f > q_{m-1}), q_m = q_{m-1} + (2 b_m - 1) 2^-m, q_0 = 0. A tie gives 0. The
dequantised values q_M are the 2^M odd multiples of 2^-M, and |f - q_M| <= 2^-M for f in [-1, 1].

Legend: d latent channels, M rounds, D label channels (M*d bits, or d indices of M bits). Bit channel = round*d + dim,
coarsest round first. Functions accept any trailing layout after the channel axis: labels [B, D, t, h, w] by
convention, with `dim=0` for a single sample [D, t, h, w].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from grn_scale.errors import UserError

MAX_ROUNDS = 8


def _check_rounds(rounds: int) -> None:
    if not 1 <= rounds <= MAX_ROUNDS:
        raise UserError(f"rounds is {rounds}, but HBQ takes 1 to {MAX_ROUNDS} (an index label is one byte)")


def quantize_index(features: torch.Tensor, rounds: int) -> torch.Tensor:
    """uint8 labels in 0..2^rounds - 1, same shape as the floating-point `features` in [-1, 1].

    The bits b_1..b_M read as a binary number, b_1 most significant. Exact for every input: the recursion crosses
    the boundary j * 2^(1-M) exactly when f lies strictly above it, so the label counts the boundaries below f.
    Scaling by a power of two is exact, and ceil keeps ties on the lower side. NaN is refused.
    """
    _check_rounds(rounds)
    if not features.is_floating_point():
        raise UserError(f"features are {features.dtype}, but HBQ quantises floating-point features in [-1, 1]")
    if torch.isnan(features).any():
        raise UserError("features hold NaN, which has no label; the clip or the tokenizer's weights are damaged")
    half = 1 << (rounds - 1)
    wide = features if features.dtype == torch.float64 else features.float()
    level = torch.ceil(wide * half) + (half - 1)
    # A positive denormal lies above 0 (its first bit is 1), but rounding modes that flush denormals make its ceil 0.
    # Its bit pattern is the one test no flush can reach: positive floats are positive integers.
    pattern = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    tiny = (pattern > 0) & (level == half - 1)
    return (level + tiny.to(level.dtype)).clamp_(0, 2 * half - 1).to(torch.uint8)


def dequantize_index(labels: torch.Tensor, rounds: int) -> torch.Tensor:
    """float32 features of the same shape: (2 * label + 1) / 2^rounds - 1."""
    _check_rounds(rounds)
    return (labels.to(torch.float32) * 2 + 1) * 2.0**-rounds - 1


def index_to_bits(labels: torch.Tensor, rounds: int, dim: int = 1) -> torch.Tensor:
    """uint8 bit labels: axis `dim` grows from d to rounds * d, bit channel = round * d + channel."""
    _check_rounds(rounds)
    return torch.cat([(labels >> (rounds - 1 - m)) & 1 for m in range(rounds)], dim=dim)


def bits_to_index(bits: torch.Tensor, rounds: int, dim: int = 1) -> torch.Tensor:
    """uint8 index labels: axis `dim` shrinks from rounds * d to d. The inverse of `index_to_bits`."""
    _check_rounds(rounds)
    if bits.shape[dim] % rounds:
        raise UserError(f"{bits.shape[dim]} bit channels do not divide into {rounds} rounds")
    labels = torch.zeros_like(bits.narrow(dim, 0, bits.shape[dim] // rounds), dtype=torch.uint8)
    for part in bits.to(torch.uint8).chunk(rounds, dim=dim):
        labels = (labels << 1) | part
    return labels


def quantize_bits(features: torch.Tensor, rounds: int) -> torch.Tensor:
    """uint8 labels 0 or 1, [B, rounds * d, ...], of floating-point features [B, d, ...] in [-1, 1]."""
    return index_to_bits(quantize_index(features, rounds), rounds)


def dequantize_bits(labels: torch.Tensor, rounds: int) -> torch.Tensor:
    """float32 features [B, d, ...] of bit labels [B, rounds * d, ...]."""
    return dequantize_index(bits_to_index(labels, rounds), rounds)


def quantize_straight_through(features: torch.Tensor, rounds: int) -> torch.Tensor:
    """`features` quantised to the values of `rounds` rounds; the gradient passes as if nothing had happened."""
    quantised = dequantize_index(quantize_index(features.detach(), rounds), rounds).to(features.dtype)
    return features + (quantised - features).detach()


def to_token_major(labels: torch.Tensor) -> torch.Tensor:
    """Labels [..., D, t, h, w] as contiguous [..., t, h, w, D]: the layout of the shards."""
    return labels.movedim(-4, -1).contiguous()


def to_channel_major(labels: torch.Tensor) -> torch.Tensor:
    """Labels [..., t, h, w, D] as contiguous [..., D, t, h, w]: the layout of the model's labels."""
    return labels.movedim(-1, -4).contiguous()


def pack_bits(bits: torch.Tensor | np.ndarray) -> bytes:
    """Bytes of bits [t, h, w, D] (0 or 1, row-major, first bit highest in its byte); the last byte is zero-filled."""
    array = bits.numpy(force=True) if isinstance(bits, torch.Tensor) else np.asarray(bits)
    if array.size and (array.min() < 0 or array.max() > 1):
        raise UserError(f"bits hold values from {array.min()} to {array.max()}, but only 0 and 1 can be packed")
    return np.packbits(array.astype(bool, copy=False)).tobytes()


def unpack_bits(data: bytes | np.ndarray, shape: Sequence[int]) -> torch.Tensor:
    """uint8 bits of `shape` (any, usually [t, h, w, D]) from `pack_bits`. UserError where the length does not fit."""
    # A copy: the bytes may be read-only, which tensors cannot be.
    array = np.frombuffer(data, np.uint8).copy() if isinstance(data, (bytes, bytearray, memoryview)) else data
    return unpack_on_device(torch.from_numpy(array), shape)


def unpack_on_device(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """As `unpack_bits`, of packed bytes (uint8) on any device, where the bits stay: only bytes travel to it."""
    count = math.prod(shape)
    if packed.numel() != (count + 7) // 8:
        raise UserError(f"{packed.numel()} bytes do not hold bits of shape {tuple(shape)}, which take "
                        f"{(count + 7) // 8}")
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] >> shifts).bitwise_and_(1).flatten()[:count].view(tuple(shape))

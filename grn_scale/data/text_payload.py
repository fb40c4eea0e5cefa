"""Text states as bytes: the payload of a text entry in a shard.

    bf16    states [tokens, hidden], little endian
    int8    fp32 scales [tokens], little endian, then values [tokens, hidden]; state = value * scale

A scale belongs to one token, because the norms of the encoder's states differ between tokens far more than within one.
"""

from __future__ import annotations

import numpy as np
import torch

LARGEST = 127
"""Largest value of an int8 payload; -128 is never written, so the range is symmetric."""


def payload_bytes(tokens: int, hidden: int, kind: str) -> int:
    """Size of the payload of one text. ValueError for an unknown kind."""
    match kind:
        case "bf16":
            return tokens * hidden * 2
        case "int8":
            return tokens * (hidden + 4)
    raise ValueError(f"text states are kept as bf16 or int8, not as {kind!r}")


def pack_states(states: torch.Tensor, kind: str) -> bytes:
    """Payload of `states`, bf16 [tokens, hidden]. ValueError for another dtype or shape, and for inf and NaN."""
    if states.dtype != torch.bfloat16 or states.dim() != 2:
        raise ValueError(f"states are {states.dtype} {tuple(states.shape)}, but must be bf16 [tokens, hidden]")
    if not states.isfinite().all():
        raise ValueError("states hold inf or NaN")
    states = states.detach().cpu()
    if kind == "bf16":
        return states.contiguous().view(torch.int16).numpy().astype("<i2", copy=False).tobytes()
    payload_bytes(*states.shape, kind)
    values, scales = quantize(states)
    return scales.numpy().astype("<f4", copy=False).tobytes() + values.numpy().tobytes()


def unpack_states(data: bytes | bytearray | memoryview | np.ndarray, tokens: int, hidden: int,
                  kind: str) -> torch.Tensor:
    """The states of a payload: bf16 [tokens, hidden], in memory of their own.

    ValueError where the payload has another length, or scales that `pack_states` does not write.
    """
    data = memoryview(data).cast("B")
    if len(data) != (expected := payload_bytes(tokens, hidden, kind)):
        raise ValueError(f"it has {len(data)} bytes of text states, but {tokens} tokens of {hidden} as {kind} take "
                         f"{expected}")
    if kind == "bf16":
        words = np.frombuffer(data, dtype="<i2").astype(np.int16)
        return torch.from_numpy(words).view(torch.bfloat16).view(tokens, hidden)
    scales = torch.from_numpy(np.frombuffer(data[: 4 * tokens], dtype="<f4").astype(np.float32))
    if not (scales.isfinite() & (scales >= 0)).all():
        raise ValueError("its text states have a scale that is negative, inf or NaN")
    values = torch.from_numpy(np.frombuffer(data[4 * tokens :], dtype=np.int8).astype(np.float32))
    return dequantize(values.view(tokens, hidden), scales)


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(values int8 [tokens, hidden], scales fp32 [tokens]) of bf16 states: to the nearest, halves to even.

    A token whose states are all zero has scale 0.
    """
    states = states.float()
    scales = states.abs().amax(dim=1) / LARGEST
    divisors = torch.where(scales > 0, scales, 1.0)
    values = (states / divisors[:, None]).round().clamp(-LARGEST, LARGEST)
    return values.to(torch.int8), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bf16 [tokens, hidden]: the states that `quantize` was given, as far as they are kept."""
    return (values * scales[:, None]).to(torch.bfloat16)

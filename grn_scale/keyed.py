"""Random numbers keyed by what they are for: (seed, purpose, index...), never by rank, worker or order.

Scalars on the host come from xxh3 of the key. Tensors come from a counter-based hash in torch integer
operations, so that CPU, CUDA and any slice of a sequence draw the same numbers.
"""

from __future__ import annotations

import statistics

import torch
import xxhash

MASK = 0xFFFFFFFF


def key64(*key: int | str) -> int:
    """64-bit integer that depends on every part of `key` (its types and its boundaries included)."""
    return xxhash.xxh3_64_intdigest(repr(key).encode())


def uniform(*key: int | str) -> float:
    """Number in (0, 1), 53 bits."""
    return ((key64(*key) >> 11) + 0.5) / (1 << 53)


def normal(*key: int | str) -> float:
    """Standard normal number."""
    return statistics.NormalDist().inv_cdf(uniform(*key))


def _mix(x: torch.Tensor) -> torch.Tensor:
    # A 32-bit avalanche mix (xor-shift-multiply; constants from Degski's and Wellons' "lowbias32" search).
    # int64 products wrap modulo 2^64, which leaves the low 32 bits exact.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def hash32(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Uniform integers in [0, 2^32) as int64, one for each broadcast pair of key and counter.

    key: int64, any 64-bit pattern (see `key64`); counter: int64 >= 0, below 2^62.
    """
    low, high = key & MASK, (key >> 32) & MASK
    x = _mix((counter & MASK) ^ low)
    x = _mix((x + (counter >> 32) * 0x9E3779B1 + high) & MASK)
    return _mix((x + low * 0x85EBCA77 + (counter & MASK)) & MASK)


def as_int64(value: int) -> int:
    """The same 64 bits as a signed integer, which is what torch tensors hold."""
    return value - (1 << 64) if value >= 1 << 63 else value

"""Random numbers keyed by what they are for: (seed, purpose, index...), never by rank, worker or order.

Scalars on the host come from xxh3 of the key. Arrays and tensors come from counter-based hashes in integer
operations (numpy's for plans, torch's for noise), so that every machine and any slice draws the same numbers.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    import torch

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


def hash64(key: int, counter: np.ndarray) -> np.ndarray:
    """Uniform 64-bit integers, uint64 [n], one for each counter (integers [n] of any value).

    Two rounds of splitmix64's finaliser, the key going in before each, so that the sequences of two keys have nothing
    in common even where counters are hashes themselves. key: 64 bits (see `key64`).
    """
    counter = np.asarray(counter).astype(np.uint64, copy=False)
    second = (key * 0x9E3779B97F4A7C15 + 1) & 0xFFFFFFFFFFFFFFFF
    return _mix64(_mix64(counter ^ np.uint64(key)) + np.uint64(second))


def uniforms(key: int, counter: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64 [n] of 53 bits, one for each counter (see `hash64`)."""
    return (hash64(key, counter) >> np.uint64(11)) * 2.0**-53


def _mix64(x: np.ndarray) -> np.ndarray:
    # Products of uint64 arrays wrap modulo 2^64.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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

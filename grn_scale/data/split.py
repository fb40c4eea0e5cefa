"""Which samples are held out from training. It follows from a sample's key alone: not from the seed, nor from what else
a dataset holds, so it is stable when a dataset grows; a larger fraction only adds samples."""

from __future__ import annotations

import numpy as np

from grn_scale.data.columns import KEY_DTYPE, key_hashes
from grn_scale.keyed import key64, uniforms


def held_out_samples(key_hash: np.ndarray, fraction: float) -> np.ndarray:
    """bool [n]: whether the samples with these hashes of their keys (`ShardColumns.key_hash`) are held out."""
    return uniforms(key64("validation split"), key_hash) < fraction


def held_out(key: str, fraction: float) -> bool:
    """Whether the sample is held out."""
    return bool(held_out_samples(key_hashes(np.array([key.encode()], KEY_DTYPE)), fraction)[0])

"""Checked random reads from a shard against one .npz file a sample, and against reading the shard front to back."""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from grn_scale.perf.measure import paired, rates, spread
from grn_scale.perf.synthetic_dataset import write_synthetic_dataset

LATENT_CHANNELS, ROUNDS = 64, 4
"""Of the official tokenizer: 32 bytes a token."""
FORMS = {"image": ((1, 16, 16), 1), "clip": ((21, 30, 52), 32)}
"""Name -> latent shape, and for how many images there is one sample: 8 KB each, and 5 s at 480p, 1 MB each."""
BLOCK = 1 << 20


def compare_formats(samples: int, repeats: int) -> dict[str, Any]:
    """For samples of 8 KB and of 1 MB: rates of the three ways, in turn, with the files in the system's cache.

    Each way ends with the packed bits in memory; the shard's are verified against their xxh3 (an .npz file has its
    own checksum). Ratios are of the repeats that belong together.
    """
    return {name: _compare(thw, max(1, samples // share), repeats) for name, (thw, share) in FORMS.items()}


def _compare(thw: tuple[int, int, int], samples: int, repeats: int) -> dict[str, Any]:
    import numpy as np

    from grn_scale.data.dataset import Dataset

    with tempfile.TemporaryDirectory(prefix="grn-bench-") as temporary:
        folder = Path(temporary)
        write_synthetic_dataset(folder, samples=samples, thw=thw, latent_channels=LATENT_CHANNELS, rounds=ROUNDS,
                                text_hidden_size=8, shard_samples=samples)
        dataset = Dataset.open(folder)
        rows = dataset.rows(0)
        shape = np.array([1, LATENT_CHANNELS * ROUNDS, *thw])
        files = [folder / f"{row.key}.npz" for row in rows]
        for row, file in zip(rows, files):
            np.savez(file, shape=shape, data=dataset.read_bits(row))
        order = random.Random(0).sample(range(samples), samples)
        rows, files = [rows[i] for i in order], [files[i] for i in order]
        shard = folder / dataset.info.video_shards[0].name
        buffer = bytearray(BLOCK)

        def read_shard() -> None:
            for row in rows:
                dataset.read_bits(row)

        def load_files() -> None:
            for file in files:
                with np.load(file) as arrays:
                    arrays["shape"], arrays["data"]

        def read_through() -> None:
            with open(shard, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    continue

        ours, theirs, through = paired((read_shard, load_files, read_through), repeats)
    payload = sum(row.length for row in rows)
    sequential = [dataset.info.video_shards[0].bytes / seconds for seconds in through]
    return {
        "samples": samples, "bytes_a_sample": payload // samples,
        "shard_samples_per_second": rates(samples, ours), "npz_samples_per_second": rates(samples, theirs),
        "shard_megabytes_per_second": rates(payload / 1e6, ours),
        "sequential_megabytes_per_second": spread([rate / 1e6 for rate in sequential]),
        "times_npz": spread([b / a for a, b in zip(ours, theirs)]),
        "share_of_sequential": spread([payload / a / rate for a, rate in zip(ours, sequential)]),
        "microseconds_a_sample": float(f"{statistics.median(ours) / samples * 1e6:.3g}")}

"""A dataset of random bits in a given shape, made by the writers of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grn_scale.perf.measure import CAPTION_TOKENS

if TYPE_CHECKING:
    from grn_scale.data.schema import DatasetInfo

CAPTIONS = 64
"""Text entries."""
TEXT_SHARD = "text-000000.tar"


def write_synthetic_dataset(folder: Path, *, samples: int, thw: tuple[int, int, int], latent_channels: int, rounds: int,
                            text_hidden_size: int, ratio_key: float = 1.0, fps: float = 16.0, task_tags: bool = False,
                            shard_samples: int = 1024, seed: int = 0) -> DatasetInfo:
    """Write the dataset into `folder`; each sample has one of a few captions with random states."""
    import numpy as np
    import torch

    from grn_scale.batch import TASKS
    from grn_scale.data import index_parts, schema
    from grn_scale.data.dataset_info import write_dataset
    from grn_scale.data.shard_writer import write_shard
    from grn_scale.data.text_payload import pack_states

    t, h, w = thw
    length = (t * h * w * latent_channels * rounds + 7) // 8
    drawn = np.random.default_rng(seed)
    refs = [schema.TextRef(f"text{number}", CAPTION_TOKENS if number else 1, TEXT_SHARD) for number in range(CAPTIONS)]
    with write_shard(folder / TEXT_SHARD) as writer:
        text_rows = []
        for ref in refs:
            states = torch.from_numpy(drawn.standard_normal((ref.tokens, text_hidden_size), np.float32)).bfloat16()
            text_rows.append(writer.add_text(ref.key, range(ref.tokens), pack_states(states, "bf16")))
    text_shard = index_parts.write_text_part(folder, writer.info, text_rows)
    video_shards = []
    for first in range(0, samples, shard_samples):
        rows = []
        with write_shard(folder / f"video-{len(video_shards):06d}.tar") as writer:
            for number in range(first, min(samples, first + shard_samples)):
                key = f"{number:032x}"
                payload = writer.add_video(key, drawn.bytes(length), {"shape": thw})
                caption = schema.Caption("", dict.fromkeys(TASKS, refs[1 + number % (CAPTIONS - 1)]))
                rows.append(schema.IndexRow(len(video_shards), number, key, payload.offset, payload.length,
                                            payload.xxh3, thw, ratio_key, (caption,)))
        video_shards.append(index_parts.write_video_part(folder, writer.info, rows, empty_tokens=1))
    return write_dataset(folder, schema.DatasetInfo(
        format_version=schema.FORMAT_VERSION, tokenizer_fingerprint="synthetic", latent_channels=latent_channels,
        rounds=rounds, text_fingerprint="synthetic", text_hidden_size=text_hidden_size, text_states="bf16",
        task_tags=task_tags, empty_text=refs[0], fps=fps, video_shards=tuple(video_shards), text_shards=(text_shard,)))

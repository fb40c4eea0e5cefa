"""Small tokenized datasets on disk, whose every byte follows from the number of its sample."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from grn_scale.batch import TASKS
from grn_scale.data.dataset_info import read_dataset_info, write_dataset
from grn_scale.data.index_parts import write_text_part, write_video_part
from grn_scale.data.schema import FORMAT_VERSION, Caption, DatasetInfo, IndexRow, TextRef
from grn_scale.data.shard_writer import write_shard
from grn_scale.data.text_payload import pack_states

CHANNELS, ROUNDS, HIDDEN = 4, 2, 6
SAMPLES = 16
"""In a shard."""
EMPTY = TextRef("empty", 1, "text-000000.tar")


def bits_of(number: int, thw: tuple[int, int, int]) -> np.ndarray:
    count = thw[0] * thw[1] * thw[2] * CHANNELS * ROUNDS
    return np.packbits(np.random.default_rng(number).integers(0, 2, count, dtype=np.uint8))


def states_of(number: int, tokens: int) -> torch.Tensor:
    return torch.full((tokens, HIDDEN), number, dtype=torch.bfloat16)


def write_tokens(folder: Path, shards: Iterable[int], name: str = "clip", kind: str = "bf16",
                 **settings) -> DatasetInfo:
    """Add shards of 16 images and clips with one caption each to the dataset in `folder`, which is made where there is
    none. kind: how texts are stored; settings: of the DatasetInfo."""
    videos, texts = [], []
    for shard in shards:
        rows, text_rows, text_shard = [], [], f"text-{shard:06d}.tar"
        with write_shard(f"{folder}/video-{shard:06d}.tar") as video, write_shard(f"{folder}/{text_shard}") as text:
            if shard == 0:
                text_rows.append(_add_text(text, EMPTY, 0, kind))
            for number in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                thw = ((1, 3, 5)[number % 3], 4, 2 + 2 * (number % 2))
                key = f"{name}{number:03d}"
                payload = video.add_video(key, bits_of(number, thw).tobytes(), {"id": number})
                ref = TextRef(f"text{number:03d}", 1 + number % 5, text_shard)
                text_rows.append(_add_text(text, ref, number, kind))
                rows.append(IndexRow(shard, number, key, payload.offset, payload.length, payload.xxh3, thw, 1.0,
                                     (Caption("long", dict.fromkeys(TASKS, ref)),), number % 7))
        videos.append(write_video_part(folder, video.info, rows, empty_tokens=EMPTY.tokens))
        texts.append(write_text_part(folder, text.info, text_rows))
    if (Path(folder) / "dataset.json").exists():
        before = read_dataset_info(folder)
        return write_dataset(folder, replace(before, video_shards=(*before.video_shards, *videos),
                                             text_shards=(*before.text_shards, *texts)))
    return write_dataset(folder, DatasetInfo(**{
        "format_version": FORMAT_VERSION, "tokenizer_fingerprint": "tokenizer", "latent_channels": CHANNELS,
        "rounds": ROUNDS, "text_fingerprint": "text", "text_hidden_size": HIDDEN, "text_states": kind,
        "task_tags": False, "empty_text": EMPTY, "fps": 16.0, "video_shards": tuple(videos),
        "text_shards": tuple(texts), **settings}))


def _add_text(writer, ref: TextRef, number: int, kind: str):
    states = None if kind == "none" else pack_states(states_of(number, ref.tokens), kind)
    return writer.add_text(ref.key, [2] * ref.tokens, states)

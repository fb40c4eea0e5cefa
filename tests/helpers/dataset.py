"""A small dataset with known bytes, made by the writers of real ones."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from grn_scale.data.dataset_info import write_dataset
from grn_scale.data.index_parts import write_text_part, write_video_part
from grn_scale.data.schema import FORMAT_VERSION, Caption, DatasetInfo, IndexRow, ShardInfo, TextRef
from grn_scale.data.shard_writer import write_shard
from grn_scale.data.text_payload import pack_states

THW, BITS = (2, 2, 3), 8


def text_key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def bits_of(number: int) -> bytes:
    return np.random.default_rng(number).integers(0, 256, 12 * BITS // 8, dtype=np.uint8).tobytes()


def states_of(number: int) -> torch.Tensor:
    return torch.randn(number % 5 + 1, 4, generator=torch.Generator().manual_seed(number)).bfloat16()


def text_of(number: int) -> TextRef:
    return TextRef(text_key_of(number), len(states_of(number)), f"text-{int(number >= 4):06d}.tar")


def write_texts(folder, shard: int, numbers, kind: str = "bf16") -> ShardInfo:
    """Text shard with the entries of text_of; entry number i has as many ids i as tokens."""
    rows = []
    with write_shard(f"{folder}/text-{shard:06d}.tar") as writer:
        for i in numbers:
            states = None if kind == "none" else pack_states(states_of(i), kind)
            rows.append(writer.add_text(text_key_of(i), [i] * len(states_of(i)), states))
    return write_text_part(folder, writer.info, rows)


def write_videos(folder, shard: int, numbers) -> ShardInfo:
    rows = []
    with write_shard(f"{folder}/video-{shard:06d}.tar") as writer:
        for i in numbers:
            payload = writer.add_video(f"clip{i}", bits_of(i), {"id": i, "shape": THW})
            captions = (Caption("short", {"T2V": text_of(i)}),)
            rows.append(IndexRow(shard, i, f"clip{i}", payload.offset, payload.length, payload.xxh3, THW, 0.561,
                                 captions, i if i % 2 else None))
    return write_video_part(folder, writer.info, rows, empty_tokens=1)


def dataset_of(videos, texts, kind: str = "bf16") -> DatasetInfo:
    return DatasetInfo(
        format_version=FORMAT_VERSION, tokenizer_fingerprint="tokenizer", latent_channels=4, rounds=2,
        text_fingerprint="text", text_hidden_size=4, text_states=kind, task_tags=True, empty_text=text_of(0), fps=16.0,
        video_shards=tuple(videos), text_shards=tuple(texts))


def make_dataset(folder, kind: str = "bf16") -> DatasetInfo:
    """Clips 0 to 2 and 3 to 4 in two shards, texts 0 to 3 and 4 to 6 in two; bytes of bits_of(i) and states_of(i)."""
    texts = [write_texts(folder, 0, range(4), kind), write_texts(folder, 1, range(4, 7), kind)]
    return write_dataset(folder, dataset_of(
        [write_videos(folder, 0, range(3)), write_videos(folder, 1, range(3, 5))], texts, kind))


def flip_byte(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def part_of(folder, shard: str):
    """Path of the index part of the shard called video-000000 or the like."""
    (path,) = (folder / "index").glob(f"{shard}-*.parquet")
    return path

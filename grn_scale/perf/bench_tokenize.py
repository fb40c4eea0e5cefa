"""Tokenization speed: decoding and encoding, each alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from grn_scale.config.schema import Config
from grn_scale.errors import UserError
from grn_scale.perf.clips import clip_requests
from grn_scale.perf.measure import rates, repeat, start_torch


def bench_tokenize(config: Config, count: int, repeats: int) -> dict[str, Any]:
    """Frames a second of decoding (in config.tokenize.decode_processes children) and of encoding, each alone;
    `count` clips."""
    import numpy as np

    from grn_scale.data.decode import DecodedClip
    from grn_scale.data.decode_pool import DecodePool
    from grn_scale.hbq import pack_bits
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.clips import encode_frames

    device = start_torch(config.train.threads)
    tokenizer = load_tokenizer(config.tokenizer.path).to(device)
    with tempfile.TemporaryDirectory(prefix="grn-bench-") as folder:
        requests = clip_requests(config, count, Path(folder))
        with DecodePool.of(config.tokenize) as pool:
            clips = [clip for _, clip in pool.map(requests) if isinstance(clip, DecodedClip)]
            if not clips:
                raise UserError(f"none of {len(requests)} clips of {config.data.manifest} can be decoded; "
                                "`grn-scale manifest validate` looks for the reasons")
            decode_seconds = repeat(lambda: list(pool.map(requests)), repeats, warmup=0)
    shape = clips[0].frames.shape
    batch = [clip.frames for clip in clips if clip.frames.shape == shape][:config.tokenize.batch_clips]

    def encode() -> None:
        for bits in encode_frames(tokenizer, np.stack(batch), config.model.rounds):
            pack_bits(bits)

    encode_seconds = repeat(encode, repeats)
    frames = sum(len(clip.frames) for clip in clips)
    return {
        "clips": len(clips), "undecodable_clips": len(requests) - len(clips), "frames": frames,
        "frame_shape": list(shape[1:]), "backends": sorted({clip.backend for clip in clips}),
        "decode_frames_per_second": rates(frames, decode_seconds),
        "encode_batch_clips": len(batch), "encode_frames_per_second": rates(len(batch) * len(batch[0]), encode_seconds),
    }

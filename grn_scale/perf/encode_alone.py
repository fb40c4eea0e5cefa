"""The encoder of one tokenize worker by itself: clips decoded beforehand, encoded on a word, timed. For `bench fleet`.

    python -m grn_scale.perf.encode_alone CONFIG PART PARTS

Takes every PARTS-th chunk of the manifest, says "ready" on stdout when all are decoded, and after a line on stdin
encodes and packs them as a worker does; then it says how many clips it did.
"""

from __future__ import annotations

import sys


def main(argv: list[str]) -> int:
    """Exit code; see the module."""
    from pathlib import Path

    import numpy as np
    import torch

    from grn_scale.config.load import load_config
    from grn_scale.data.decode import decode_clip
    from grn_scale.hbq import pack_bits
    from grn_scale.perf.clips import clip_requests
    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.clips import encode_frames

    config, part, parts = load_config(argv[0]), int(argv[1]), int(argv[2])
    torch.set_num_threads(config.tokenize.threads)
    tokenizer = load_tokenizer(config.tokenizer.path).to("cuda" if torch.cuda.is_available() else "cpu")
    requests = clip_requests(config, sys.maxsize, Path(config.data.manifest).parent)
    chunk = config.tokenize.shard_samples
    clips = [decode_clip(request).frames for i, request in enumerate(requests) if i // chunk % parts == part]
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for clip in clips:
        by_shape.setdefault(clip.shape, []).append(clip)
    print("ready", flush=True)
    sys.stdin.readline()
    size = config.tokenize.batch_clips
    for alike in by_shape.values():
        for first in range(0, len(alike), size):
            for bits in encode_frames(tokenizer, np.stack(alike[first : first + size]), config.model.rounds):
                pack_bits(bits)
    print(len(clips), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

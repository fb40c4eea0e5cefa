"""Small video files, a manifest of them, a text encoder and a random video tokenizer: what tokenize needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 230), "yellow": (230, 220, 30)}


def write_clip(path: Path, number: int, frames: int = 9, height: int = 32, width: int = 32, fps: int = 16) -> Path:
    """An H.264 file in which a square of a colour by `number` moves over a background of its own."""
    import av

    color = list(COLORS.values())[number % len(COLORS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for t in range(frames):
            image = np.full((height, width, 3), (number * 37) % 200, np.uint8)
            left = (2 * t + number) % (width - 8)
            image[8:16, left:left + 8] = color
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def caption(number: int) -> str:
    return f"{list(COLORS)[number % len(COLORS)]} square number {number}"


def write_manifest(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_tokenizer(path: Path, seed: int = 0) -> Path:
    """A tokenizer of 4 latent channels with random weights."""
    from safetensors.torch import save_file

    from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = VideoTokenizer(VideoTokenizerShape(8, 8, 4, (1, 2, 2, 2), residual_blocks=1))
    save_file(tokenizer.state_dict(), path)
    return path


def write_text_encoder(folder: Path, clips: int) -> Path:
    from grn_scale.demo.text_encoder import build_text_encoder

    return build_text_encoder([caption(number) for number in range(clips)], folder)

"""Sampled labels -> pictures: dequantise, decode, 8-bit frames, MP4 files; and the labels of a given first frame.

Legend: D labels a token, d latent channels, t latent frames, T = 1 + 4 (t - 1) frames, H and W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby

import numpy as np
import torch

from grn_scale import hbq
from grn_scale.config.schema import LabelledShape
from grn_scale.tokenizer.clips import to_frames, to_video
from grn_scale.tokenizer.video import VideoTokenizer

BATCH_CELLS = 2048
"""Latent cells decoded at once: small clips of one shape go together, a longer clip goes latent by latent."""


def to_features(labels: torch.Tensor, config: LabelledShape) -> torch.Tensor:
    """fp32 features [B, d, t, h, w] of labels [B, D, t, h, w] in the model's label form."""
    return (hbq.dequantize_bits if config.label_form == "bit" else hbq.dequantize_index)(labels, config.rounds)


@torch.inference_mode()
def decode_clips(tokenizer: VideoTokenizer, labels: Iterable[torch.Tensor],
                 config: LabelledShape) -> Iterator[np.ndarray]:
    """uint8 RGB frames [T, H, W, 3] of each clip's labels [D, t, h, w], in their order.

    The memory is that of BATCH_CELLS latent cells, or of one latent frame where that is more, and of the frames.
    """
    device = next(tokenizer.parameters()).device
    for shape, clips in groupby(labels, key=lambda clip: clip.shape):
        cells = shape[1] * shape[2] * shape[3]
        for batch in _batches(clips, max(1, BATCH_CELLS // cells)):
            features = to_features(torch.stack(batch).to(device), config)
            pieces = features.split(1, dim=2) if cells > BATCH_CELLS else [features]
            yield from np.concatenate([to_frames(piece) for piece in tokenizer.decode_stream(pieces)], axis=1)


def _batches(items: Iterable[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    batch: list[torch.Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def encode_first_frame(tokenizer: VideoTokenizer, frame: np.ndarray, config: LabelledShape) -> torch.Tensor:
    """uint8 labels [D, 1, h, w] on the CPU of a picture, uint8 RGB [H, W, 3] of whole latent cells."""
    features = tokenizer.encode(to_video(frame[None, None]).to(next(tokenizer.parameters()).device)).float()
    quantise = hbq.quantize_bits if config.label_form == "bit" else hbq.quantize_index
    return quantise(features, config.rounds)[0].cpu()


def encode_mp4(frames: np.ndarray, fps: float) -> bytes:
    """H.264 MP4 file of uint8 RGB frames [T, H, W, 3], H and W even; the same bytes for the same frames.

    yuv420p, because browsers and most players show nothing else.
    """
    import av

    rate, file = Fraction(fps).limit_denominator(1001), io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # One thread, given times and no macroblock trees: otherwise x264 now and then spends a few bytes more or less.
        stream = container.add_stream("libx264", rate=rate, options={
            "crf": "12", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the numbers 0..count-1, evenly spread, the first and the last among them."""
    if count <= most:
        return range(count)
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]

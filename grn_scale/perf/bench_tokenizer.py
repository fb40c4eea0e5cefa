"""Speed of the video tokenizer beside the reference's chunk-by-chunk way, and of bf16 beside fp32; weights and clip
are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.perf.clips import clip_requests
from grn_scale.perf.measure import paired, spread, start_torch

if TYPE_CHECKING:
    import torch

    from grn_scale.tokenizer.video import VideoTokenizer

OFFICIAL_LATENT_CHANNELS = 64


def bench_tokenizer(config: Config, widths: str | None, repeats: int) -> dict[str, Any]:
    """Frames a second of encoding and decoding one clip, each way in turn, and what the ways differ by.

    The clip is the first of config.data.manifest, or one made for the purpose, in the size config.tokenize gives it.
    widths: "DIM,DEC_DIM" takes random weights of the official architecture in these widths, not config.tokenizer.path.
    """
    import torch

    from grn_scale.tokenizer.chunk_by_chunk import ChunkByChunk
    from grn_scale.tokenizer.clips import to_video

    device = start_torch(config.train.threads)
    tokenizer = _tokenizer(config, widths).to(device)
    chunked = ChunkByChunk(tokenizer)
    video = to_video(_first_clip(config)[None]).to(device)
    frames = video.shape[2]
    with torch.inference_mode():
        features = tokenizer.encode(video)
        encode = _beside(lambda: chunked.encode(video), lambda: tokenizer.encode(video), frames, repeats, device)
        decode = _beside(lambda: chunked.decode(features), lambda: tokenizer.decode(features), frames, repeats, device)
        return {"weights": f"random, {widths}" if widths else config.tokenizer.path,
                "frame_shape": list(video.shape[2:]), "threads": torch.get_num_threads(),
                "encode": encode, "decode": decode,
                "bf16": _bf16(tokenizer, video, features, config.model.rounds, repeats, device)}


def _tokenizer(config: Config, widths: str | None) -> VideoTokenizer:
    import torch

    from grn_scale.tokenizer import load_tokenizer
    from grn_scale.tokenizer.layers import use_channels_last
    from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

    if widths is None:
        return load_tokenizer(config.tokenizer.path)
    try:
        encoder, decoder = map(int, widths.split(","))
    except ValueError:
        raise ConfigError(f"--widths is {widths!r}, but must be two numbers, encoder and decoder: 160,256") from None
    if min(encoder, decoder) < 1:
        raise ConfigError(f"--widths is {widths!r}, but both must be at least 1")
    torch.manual_seed(config.seed)
    shape = VideoTokenizerShape(encoder, decoder, OFFICIAL_LATENT_CHANNELS)
    return use_channels_last(VideoTokenizer(shape)).eval().requires_grad_(False)


def _first_clip(config: Config):
    """uint8 [T, H, W, 3]"""
    from grn_scale.data.decode import DecodeError, decode_clip

    with tempfile.TemporaryDirectory(prefix="grn-bench-") as folder:
        (request,) = clip_requests(config, 1, Path(folder))
        try:
            return decode_clip(request).frames
        except DecodeError as error:
            raise UserError(f"data.manifest: {error}") from error


def _beside(before, now, frames: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Frames a second of both, the median and range of the quotients within each turn, and how far results differ."""
    first, second = before().double(), now().double()
    distance = (first - second).norm() / first.norm()
    slow, fast = paired([_waiting(before, device), _waiting(now, device)], repeats)
    return {"chunk_by_chunk_frames_per_second": spread([frames / seconds for seconds in slow]),
            "frames_per_second": spread([frames / seconds for seconds in fast]),
            "times_as_fast": spread([one / other for one, other in zip(slow, fast)]),
            "relative_l2": distance.item()}


def _bf16(tokenizer: VideoTokenizer, video: torch.Tensor, features: torch.Tensor, rounds: int, repeats: int,
          device: torch.device) -> dict[str, Any]:
    """The same in bf16 beside fp32: speed, and the share of HBQ bits that come out otherwise, by round."""
    import copy

    from grn_scale.hbq import quantize_bits

    small = copy.deepcopy(tokenizer).bfloat16()
    low_video, low_features = video.bfloat16(), features.bfloat16()
    bits = quantize_bits(features, rounds)
    other = quantize_bits(small.encode(low_video).float(), rounds)
    shares = (bits != other).unflatten(1, (rounds, -1)).float().mean(dim=(0, 2, 3, 4, 5)).tolist()
    result: dict[str, Any] = {"differing_bits": sum(shares) / rounds, "differing_bits_by_round": shares}
    for name, works in (("encode", (lambda: tokenizer.encode(video), lambda: small.encode(low_video))),
                        ("decode", (lambda: tokenizer.decode(features), lambda: small.decode(low_features)))):
        slow, fast = paired([_waiting(work, device) for work in works], repeats)
        result[name] = {"frames_per_second": spread([video.shape[2] / seconds for seconds in fast]),
                        "times_as_fast_as_fp32": spread([one / two for one, two in zip(slow, fast)])}
    return result


def _waiting(work, device: torch.device):
    """The work, and the wait for its device."""
    import torch

    def finished() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return finished

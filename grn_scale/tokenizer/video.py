"""The causal video autoencoder (GRN reference, section 2): pixels <-> latent features, stride 16 in space, 4 in time.

Legend: B clips, T = 1 + 4k frames, t = 1 + k latents, H and W pixels (multiples of 16), z latent channels.
`encode` and `decode` take a whole clip; `encode_stream` and `decode_stream` the same clip piece by piece in bounded
memory, with equal results (see layers.py). Key names are those of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from grn_scale.errors import UserError
from grn_scale.tokenizer.layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    History,
    MidAttention,
    ResidualBlock,
    Upsample,
    add_duplicate_shortcut,
    average_shortcut,
    normed_conv,
    patchify,
    run,
    unpatchify,
)

SPACE_STRIDE = 16
TIME_STRIDE = 4


@dataclass(frozen=True)
class VideoTokenizerShape:
    """Widths of a video tokenizer. The official ones: 160, 256, 64 (image only: 16), (1, 2, 4, 4), 2."""

    dim: int
    """Encoder width before the multipliers."""
    dec_dim: int
    """Decoder width before the multipliers."""
    latent_channels: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Width of each stage; all but the last one halve height and width."""
    residual_blocks: int = 2
    """Per encoder stage; a decoder stage has one more."""
    time_downsample: tuple[bool, ...] = (False, True, True)
    """Which of the halving stages halve the frames too."""


class EncoderStage(nn.Module):
    """Residual blocks, then a reduction, plus the average of what was reduced."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, space: bool, time: bool) -> None:
        super().__init__()
        self.out_channels, self.ft, self.fs = out_channels, 1 + time, 1 + space
        layers = [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks)]
        self.downsamples = nn.Sequential(*layers, *([Downsample(out_channels, time)] if space else []))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        return run(self.downsamples, x, history) + average_shortcut(x, self.out_channels, self.ft, self.fs)


class DecoderStage(nn.Module):
    """Residual blocks, then an enlargement, plus a copy of the input where the stage enlarges."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, space: bool, time: bool) -> None:
        super().__init__()
        self.out_channels, self.ft, self.fs = out_channels, 1 + time, 1 + space
        layers = [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks)]
        self.upsamples = nn.Sequential(*layers, *([Upsample(out_channels, time)] if space else []))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        y = run(self.upsamples, x, history)
        return y if self.fs == 1 else add_duplicate_shortcut(y, x, self.ft, self.fs, history.first)


class Encoder(nn.Module):
    def __init__(self, shape: VideoTokenizerShape) -> None:
        super().__init__()
        widths = [shape.dim * m for m in (1, *shape.multipliers)]
        last = len(shape.multipliers) - 1
        self.conv1 = CausalConv3d(12, widths[0], 3)
        self.downsamples = nn.Sequential(*(
            EncoderStage(widths[i], widths[i + 1], shape.residual_blocks, i < last,
                         i < last and shape.time_downsample[i])
            for i in range(last + 1)))
        self.middle = nn.Sequential(ResidualBlock(widths[-1], widths[-1]), MidAttention(widths[-1]),
                                    ResidualBlock(widths[-1], widths[-1]))
        self.head = nn.Sequential(ChannelNorm(widths[-1]), nn.SiLU(),
                                  CausalConv3d(widths[-1], 2 * shape.latent_channels, 3))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        x = self.conv1(x, history)
        for stage in self.downsamples:
            x = stage(x, history)
        return normed_conv(self.head[0], self.head[2], run(self.middle, x, history), history)


class Decoder(nn.Module):
    def __init__(self, shape: VideoTokenizerShape) -> None:
        super().__init__()
        reverse = shape.multipliers[::-1]
        widths = [shape.dec_dim * m for m in (reverse[0], *reverse)]
        time = shape.time_downsample[::-1]
        last = len(reverse) - 1
        self.conv1 = CausalConv3d(shape.latent_channels, widths[0], 3)
        self.middle = nn.Sequential(ResidualBlock(widths[0], widths[0]), MidAttention(widths[0]),
                                    ResidualBlock(widths[0], widths[0]))
        self.upsamples = nn.Sequential(*(
            DecoderStage(widths[i], widths[i + 1], shape.residual_blocks + 1, i < last, i < last and time[i])
            for i in range(last + 1)))
        self.head = nn.Sequential(ChannelNorm(widths[-1]), nn.SiLU(), CausalConv3d(widths[-1], 12, 3))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        x = run(self.middle, self.conv1(x, history), history)
        for stage in self.upsamples:
            x = stage(x, history)
        return normed_conv(self.head[0], self.head[2], x, history)


class VideoTokenizer(nn.Module):
    """Encoder and decoder between video [B, 3, T, H, W] in [-1, 1] and features [B, z, t, H/16, W/16] in (-1, 1)."""

    def __init__(self, shape: VideoTokenizerShape) -> None:
        super().__init__()
        self.shape = shape
        z = shape.latent_channels
        self.encoder = Encoder(shape)
        # The 1x1x1 maps beside the latent. Half of conv1's output (a variance once) is never read.
        self.conv1 = CausalConv3d(2 * z, 2 * z, 1)
        self.conv2 = CausalConv3d(z, z, 1)
        self.decoder = Decoder(shape)

    @property
    def latent_channels(self) -> int:
        return self.shape.latent_channels

    def set_mid_attention(self, enabled: bool) -> None:
        """Run the attention in the middle of encoder and decoder (on by default), or leave it out."""
        for module in self.modules():
            if isinstance(module, MidAttention):
                module.enabled = enabled

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Features [B, z, 1+k, H/16, W/16] in (-1, 1) of video [B, 3, 1+4k, H, W], in one pass."""
        self._check_video(video, first=True)
        return self._encode(video, History(keep=False))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, 1+4k, H, W], not clamped to [-1, 1], of features [B, z, 1+k, h, w], in one pass."""
        self._check_features(features)
        return self._decode(features, History(keep=False))

    def encode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Features of the next latents for every piece of a clip; concatenated they equal `encode`.

        The first piece holds 1 + 4j frames, every later one 4j; memory follows the largest piece, not the clip.
        """
        history = History(keep=True)
        for piece in pieces:
            self._check_video(piece, history.first)
            yield self._encode(piece, history)
            history.first = False

    def decode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Frames of every piece [B, z, latents, h, w] of a clip's features; concatenated they equal `decode`."""
        history = History(keep=True)
        for piece in pieces:
            self._check_features(piece)
            yield self._decode(piece, history)
            history.first = False

    def encode_chunked(self, video: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """`encode` with the memory of frame 0, then of `groups` groups of four frames at a time."""
        self._check_video(video, first=True)
        pieces = video.tensor_split(_cuts(video.shape[2], TIME_STRIDE * groups), 2)
        return torch.cat(list(self.encode_stream(pieces)), 2)

    def decode_chunked(self, features: torch.Tensor, latents: int = 1) -> torch.Tensor:
        """`decode` with the memory of latent 0, then of `latents` latents at a time."""
        self._check_features(features)
        return torch.cat(list(self.decode_stream(features.tensor_split(_cuts(features.shape[2], latents), 2))), 2)

    def _encode(self, video: torch.Tensor, history: History) -> torch.Tensor:
        moments = self.conv1(self.encoder(patchify(video), history), history)
        return torch.tanh(moments[:, :self.latent_channels])

    def _decode(self, features: torch.Tensor, history: History) -> torch.Tensor:
        return unpatchify(self.decoder(self.conv2(features, history), history))

    def _check_video(self, video: torch.Tensor, first: bool) -> None:
        if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
            raise UserError(f"video is {video.dtype} {list(video.shape)}, but must be floating point [B, 3, T, H, W] "
                            "in [-1, 1]")
        frames, height, width = video.shape[2:]
        if height % SPACE_STRIDE or width % SPACE_STRIDE or not height or not width:
            raise UserError(f"video is {height} x {width} pixels, but both must be multiples of {SPACE_STRIDE}: "
                            "resize or crop it")
        if first and frames % TIME_STRIDE != 1:
            nearest = f"cut it to {frames - (frames - 1) % TIME_STRIDE}" if frames else "give at least 1"
            raise UserError(f"video has {frames} frames, but the tokenizer takes 1 + 4k: {nearest} (frames that do not "
                            "fill a group of four would be lost)")
        if not first and (frames % TIME_STRIDE or not frames):
            raise UserError(f"a later piece has {frames} frames, but must hold whole groups of {TIME_STRIDE}")

    def _check_features(self, features: torch.Tensor) -> None:
        if features.ndim != 5 or features.shape[1] != self.latent_channels or not features.shape[2]:
            raise UserError(f"features are {list(features.shape)}, but this tokenizer decodes "
                            f"[B, {self.latent_channels}, t, h, w] with t >= 1")


def _cuts(length: int, step: int) -> list[int]:
    """Where to split so that item 0 stands alone and the rest comes in pieces of `step`."""
    return list(range(1, length, step))

"""What the tokenizer is compared with: the same network run as the reference runs it (GRN reference, section 2).

Frame 0 alone, then groups of four frames; decoding latent by latent. Every convolution pads its input and keeps its
last two frames, normalisation divides by a vector norm, memory is laid out channels first. Weights and results (up to
rounding) are those of `VideoTokenizer`; only the way there differs.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from grn_scale.tokenizer.layers import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    MidAttention,
    ResidualBlock,
    Upsample,
    average_shortcut,
    batch_to_frames,
    frames_to_batch,
    patchify,
    unpatchify,
)
from grn_scale.tokenizer.video import TIME_STRIDE, Decoder, Encoder, VideoTokenizer


class ChunkByChunk:
    """`encode` and `decode` of a tokenizer, one group of frames or one latent at a time."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self._tokenizer = copy.deepcopy(tokenizer).to(memory_format=torch.contiguous_format)
        for module in self._tokenizer.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                module.weight.data = module.weight.data.contiguous()
        self._cache: dict[nn.Module, torch.Tensor] = {}

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """As `VideoTokenizer.encode`."""
        self._cache.clear()
        video = patchify(video.contiguous())
        pieces = [video[:, :, :1], *video[:, :, 1:].split(TIME_STRIDE, 2)]
        moments = torch.cat([self._encoder(self._tokenizer.encoder, piece, i == 0)
                             for i, piece in enumerate(pieces) if piece.shape[2]], 2)
        self._cache.clear()
        return torch.tanh(self._conv(self._tokenizer.conv1, moments)[:, :self._tokenizer.latent_channels])

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """As `VideoTokenizer.decode`."""
        self._cache.clear()
        x = self._conv(self._tokenizer.conv2, features.contiguous())
        frames = [self._decoder(self._tokenizer.decoder, x[:, :, i:i + 1], i == 0) for i in range(x.shape[2])]
        self._cache.clear()
        return unpatchify(torch.cat(frames, 2))

    def _encoder(self, encoder: Encoder, x: torch.Tensor, first: bool) -> torch.Tensor:
        x = self._conv(encoder.conv1, x)
        for stage in encoder.downsamples:
            shortcut = average_shortcut(x.clone(), stage.out_channels, stage.ft, stage.fs)
            x = self._run(stage.downsamples, x, first) + shortcut
        return self._run(encoder.head, self._run(encoder.middle, x, first), first)

    def _decoder(self, decoder: Decoder, x: torch.Tensor, first: bool) -> torch.Tensor:
        x = self._run(decoder.middle, self._conv(decoder.conv1, x), first)
        for stage in decoder.upsamples:
            before = x.clone()
            x = self._run(stage.upsamples, x, first)
            if stage.fs > 1:
                x = x + _duplicate(before, stage.out_channels, stage.ft, stage.fs, first)
        return self._run(decoder.head, x, first)

    def _run(self, layers: nn.Module, x: torch.Tensor, first: bool) -> torch.Tensor:
        for layer in layers:
            if isinstance(layer, CausalConv3d):
                x = self._conv(layer, x)
            elif isinstance(layer, ChannelNorm):
                x = _norm(layer, x)
            elif isinstance(layer, ResidualBlock):
                straight = x if layer.shortcut is None else self._conv(layer.shortcut, x)
                x = self._run(layer.residual, x, first) + straight
            elif isinstance(layer, MidAttention):
                x = _attention(layer, x)
            elif isinstance(layer, Downsample):
                x = self._down(layer, x, first)
            elif isinstance(layer, Upsample):
                x = self._up(layer, x, first)
            else:
                x = layer(x)
        return x

    def _conv(self, conv: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
        """Kept frames, or zeros, in front; zeros around; then a convolution without padding."""
        past = conv.kernel_size[0] - 1
        if past:
            before = self._cache.get(conv)
            kept = x[:, :, -past:].clone()
            if kept.shape[2] < past and before is not None:
                kept = torch.cat([before[:, :, -1:], kept], 2)
            self._cache[conv] = kept
            if before is not None:
                past -= before.shape[2]
                x = torch.cat([before, x], 2)
        rows, columns = conv.padding[1:]
        x = F.pad(x, (columns, columns, rows, rows, past, 0))
        return F.conv3d(x, conv.weight, conv.bias)

    def _down(self, layer: Downsample, x: torch.Tensor, first: bool) -> torch.Tensor:
        x = batch_to_frames(layer.resample(frames_to_batch(x).contiguous()), x.shape[0])
        if layer.time_conv is None:
            return x
        before, self._cache[layer] = self._cache.get(layer), x[:, :, -1:].clone()
        return x if first else layer.time_conv(torch.cat([before, x], 2))

    def _up(self, layer: Upsample, x: torch.Tensor, first: bool) -> torch.Tensor:
        if layer.time_conv is not None and not first:
            x = self._conv(layer.time_conv, x).unflatten(1, (2, -1))
            x = x.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return batch_to_frames(layer.resample(frames_to_batch(x).contiguous()), x.shape[0])


def _norm(layer: ChannelNorm, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x, dim=1) * layer.scale * layer.gamma


def _attention(layer: MidAttention, x: torch.Tensor) -> torch.Tensor:
    if not layer.enabled:
        return x
    frames = frames_to_batch(x).contiguous()
    q, k, v = layer.to_qkv(_norm(layer.norm, frames)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous().chunk(3, -1)
    mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
    return x + batch_to_frames(layer.proj(mixed), x.shape[0])


def _duplicate(x: torch.Tensor, out_channels: int, ft: int, fs: int, first: bool) -> torch.Tensor:
    b, c, t, h, w = x.shape
    x = x.repeat_interleave(out_channels * ft * fs * fs // c, dim=1)
    x = x.reshape(b, out_channels, ft, fs, fs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.reshape(b, out_channels, t * ft, h * fs, w * fs)
    return x[:, :, ft - 1:] if first else x

"""Building blocks of the causal video autoencoder (GRN reference, section 2), each usable clip by clip or in chunks.

Legend: B clips, C channels, T frames, H rows, W columns; tensors are [B, C, T, H, W].

One forward serves both forms. Every block takes a `History`: what the layers keep of the frames before this chunk.
The first chunk is frame 0 followed by any number of whole groups, a later chunk is whole groups only. A clip in one
pass is a first chunk that holds everything, so the two forms cannot drift apart.

Module and parameter names are those of the official checkpoints; do not rename them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SLOW_CONV3D_NUMEL = 20480
"""Up to so many values (C*T*H), torch in one thread computes the 3D convolution of a single clip without oneDNN, 10
times as slowly (ConvParams::use_mkldnn in ATen)."""


class History:
    """Last frames each temporal layer has seen, by layer. `keep=False` stores nothing: one pass over one clip."""

    def __init__(self, keep: bool) -> None:
        self.first = True
        """True during the chunk that starts with frame 0."""
        self._keep = keep
        self._frames: dict[nn.Module, torch.Tensor] = {}

    def get(self, layer: nn.Module) -> torch.Tensor | None:
        return self._frames.get(layer)

    def put(self, layer: nn.Module, x: torch.Tensor, frames: int) -> None:
        """Remember the last `frames` frames of x [B, C, T, H, W], zeros before the first (a copy: x can be freed)."""
        if self._keep and frames:
            last = x[:, :, -frames:]
            missing = frames - last.shape[2]
            self._frames[layer] = F.pad(last, (0, 0, 0, 0, missing, 0)) if missing else last.clone()


class CausalConv3d(nn.Conv3d):
    """3D convolution whose time padding lies in the past only: the frames before this chunk, else zeros."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int]) -> None:
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        past = self._past(x, history)
        return self.valid(torch.cat((past, x), 2) if past.shape[2] else x, history)

    def room(self, x: torch.Tensor, history: History) -> tuple[torch.Tensor, torch.Tensor]:
        """What `valid` takes of a tensor like x: the past is there, and the second result is where to write x."""
        past = self._past(x, history)
        begin = past.shape[2]
        whole = x.new_empty(x.shape[0], begin + x.shape[2], *x.shape[3:], x.shape[1]).movedim(-1, 1)
        whole[:, :, :begin] = past
        return whole, whole[:, :, begin:]

    def valid(self, x: torch.Tensor, history: History) -> torch.Tensor:
        """The convolution of x that has the frames before it in front already."""
        history.put(self, x, self.kernel_size[0] - 1)
        weight = self.weight[:, :, -x.shape[2]:]  # with one frame, its past are zeros: the last tap does
        if self.kernel_size[1:] == (1, 1):
            return matrix_conv(x, weight, self.bias)
        if x.shape[2] == 1:
            return F.conv2d(x.squeeze(2), weight.squeeze(2), self.bias, padding=self.padding[1:]).unsqueeze(2)
        if x.device.type == "cpu" and (x.numel() < self.weight.numel() or self._is_slow_conv3d(x)):
            return self._by_frames(x)  # copies x; the 3D convolution copies the weight
        return super().forward(x)

    @staticmethod
    def _is_slow_conv3d(x: torch.Tensor) -> bool:
        return x.shape[0] == 1 and x.shape[1:4].numel() <= SLOW_CONV3D_NUMEL

    def _past(self, x: torch.Tensor, history: History) -> torch.Tensor:
        """The frames before x that the kernel reaches: those kept, zeros, or none before a lone first frame."""
        before = history.get(self)
        if before is not None:
            return before
        frames = 0 if x.shape[2] == 1 else self.kernel_size[0] - 1
        return x.new_zeros(x.shape[0], frames, *x.shape[3:], x.shape[1]).movedim(-1, 1)

    def _by_frames(self, x: torch.Tensor) -> torch.Tensor:
        """The same convolution in 2D: the taps of each frame side by side as channels, the frames as a batch."""
        taps, frames = self.kernel_size[0], x.shape[2] - self.kernel_size[0] + 1
        x = torch.cat([x[:, :, tap:tap + frames] for tap in range(taps)], 1)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        return batch_to_frames(F.conv2d(frames_to_batch(x), weight, self.bias, padding=self.padding[1:]), x.shape[0])


class ChannelNorm(nn.Module):
    """x / max(|x|_2 over channels, 1e-12) * sqrt(C) * gamma."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inverse_norm(x) * x * (self.scale * self.gamma)

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The same into `out`, where no gradient is recorded. Fresh memory costs more time than the arithmetic."""
        return torch.mul(x, self.inverse_norm(x), out=out).mul_(self.scale * self.gamma)

    @staticmethod
    def inverse_norm(x: torch.Tensor) -> torch.Tensor:
        """[B, 1, ...]. Ten times as quick where memory is channels last as where channels are strided."""
        return torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12).reciprocal()


def normed_conv(norm: ChannelNorm, conv: CausalConv3d, x: torch.Tensor, history: History) -> torch.Tensor:
    """conv(silu(norm(x)))."""
    if torch.is_grad_enabled() and (x.requires_grad or norm.gamma.requires_grad):
        return conv(F.silu(norm(x)), history)
    whole, inside = conv.room(x, history)
    F.silu(norm.write(x, inside), inplace=True)
    return conv.valid(whole, history)


def matrix_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """A convolution over time at most, without padding, as one matrix product; torch's own kernels are slow on CPUs.

    x: [B, C, T, H, W], weight [out, C, taps, 1, 1] and a stride over time, or [B, C, H, W] with [out, C, 1, 1].
    """
    taps = weight.shape[2]
    if taps > 1:
        end = x.shape[2] - taps + 1
        x = torch.cat([x[:, :, tap:tap + end:stride] for tap in range(taps)], 1)
        weight = weight.transpose(1, 2)
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def run(layers: nn.Module, x: torch.Tensor, history: History) -> torch.Tensor:
    """x through a sequence in which some layers look at earlier frames."""
    for layer in layers:
        x = layer(x, history) if isinstance(layer, (CausalConv3d, ResidualBlock, Downsample, Upsample)) else layer(x)
    return x


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_channels), nn.SiLU(), CausalConv3d(in_channels, out_channels, 3),
            # The sixth place is a dropout in the official layout; here it only keeps the key numbers.
            ChannelNorm(out_channels), nn.SiLU(), nn.Identity(), CausalConv3d(out_channels, out_channels, 3))
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        y = normed_conv(norm2, conv2, normed_conv(norm1, conv1, x, history), history)
        return y.add_(x if self.shortcut is None else self.shortcut(x, history))


def frames_to_batch(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class MidAttention(nn.Module):
    """Single-head attention over the places of each frame, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dims=2)
        self.to_qkv = nn.Conv2d(channels, channels * 3, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        self.enabled = True
        """Off: returns its input untouched, as the official v2 tokenizer training does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return x
        frames = frames_to_batch(x)
        qkv = matrix_conv(self.norm(frames), self.to_qkv.weight, self.to_qkv.bias)
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + batch_to_frames(matrix_conv(mixed, self.proj.weight, self.proj.bias), x.shape[0])


class Downsample(nn.Module):
    """Halves height and width, and with `time` also the frames after the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        x = batch_to_frames(self.resample(frames_to_batch(x)), x.shape[0])
        if self.time_conv is None:
            return x
        before = history.get(self)
        history.put(self, x, 1)
        if before is None and x.shape[2] == 1:
            return x
        halved = matrix_conv(x if before is None else torch.cat([before, x], 2), self.time_conv.weight,
                             self.time_conv.bias, stride=2)
        return torch.cat([x[:, :, :1], halved], 2) if before is None else halved


class Upsample(nn.Module):
    """Doubles height and width, and with `time` also every frame but the first."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"),
                                      nn.Conv2d(channels, channels, 3, padding=1))
        self.time_conv = CausalConv3d(channels, channels * 2, (3, 1, 1)) if time else None

    def forward(self, x: torch.Tensor, history: History) -> torch.Tensor:
        if self.time_conv is not None:
            # Frame 0 passes as it is and never enters the time convolution's past.
            head, x = (x[:, :, :1], x[:, :, 1:]) if history.first else (x[:, :, :0], x)
            if x.shape[2]:
                x = self.time_conv(x, history).movedim(1, -1).unflatten(-1, (2, -1))  # [B, T, H, W, 2, C]
                x = x.movedim(-2, 2).flatten(1, 2).movedim(-1, 1)  # half 0 is frame 2j, half 1 is frame 2j + 1
            x = torch.cat([head, x], 2)
        return batch_to_frames(self.resample(frames_to_batch(x)), x.shape[0])


def average_shortcut(x: torch.Tensor, out_channels: int, ft: int, fs: int) -> torch.Tensor:
    """Blocks of (ft, fs, fs) become channels (order C, time, row, column), then means over consecutive groups."""
    if x.shape[2] % ft:
        x = F.pad(x, (0, 0, 0, 0, 1, 0))
    b, c, t, h, w = x.shape
    x = x.movedim(1, -1).reshape(b, t // ft, ft, h // fs, fs, w // fs, fs, c).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, t // ft, h // fs, w // fs, out_channels, -1).mean(-1).movedim(-1, 1)


def add_duplicate_shortcut(y: torch.Tensor, x: torch.Tensor, ft: int, fs: int, first: bool) -> torch.Tensor:
    """y plus x [B, C, T, H, W] enlarged by (ft, fs, fs): each channel repeated, then spread over blocks. y changes.

    Frame 0 of a clip becomes one frame, not ft: it is the last one of its block.
    """
    if x.shape[1] < y.shape[1]:
        x = x.repeat_interleave(y.shape[1] // x.shape[1], dim=1)
    step = x.shape[1] // y.shape[1]
    block = ft * fs * fs
    for number in range(block):
        i, j, k = number // (fs * fs), number // fs % fs, number % fs
        begin = i - (ft - 1) * first  # frame of y that frame 0 of x gives
        y[:, :, begin % ft::ft, j::fs, k::fs] += x[:, number * step // block::step, begin < 0:]
    return y


def patchify(video: torch.Tensor) -> torch.Tensor:
    """[B, 3, T, H, W] -> [B, 12, T, H/2, W/2]; new channel = c*4 + column in patch * 2 + row in patch."""
    b, c, t, h, w = video.shape
    blocks = video.reshape(b, c, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 6, 4)
    return blocks.reshape(b, t, h // 2, w // 2, c * 4).movedim(-1, 1)


def unpatchify(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `patchify`."""
    b, c, t, h, w = x.shape
    return x.reshape(b, c // 4, 2, 2, t, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(b, c // 4, t, h * 2, w * 2)


def use_channels_last(module: nn.Module) -> nn.Module:
    """`module` itself, its convolutions' weights laid out channels last: same results, up to 2.5 x faster on a CPU."""
    for part in module.modules():
        if isinstance(part, CausalConv3d):  # out, rows, columns, frames, in: `_by_frames` need not move a weight
            part.weight.data = part.weight.data.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
        elif isinstance(part, nn.Conv3d):
            part.to(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)
    return module

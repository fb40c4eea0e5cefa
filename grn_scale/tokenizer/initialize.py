"""Initial weights from which a small tokenizer learns in minutes: every path starts as a plain linear map of pixels.

The architecture's own default (each convolution random, nothing else) leaves a narrow tokenizer on a plateau where
it draws the background alone. Here the residual branches start at zero, and what they add to starts as an isometry,
so the latent holds the image's coarse shape from the first step on. Convolutions over time start without a past: an
untrained clip is coded as its frames are, and training on single frames carries over to clips.
"""

from __future__ import annotations

import torch
from torch import nn

from grn_scale.tokenizer.layers import CausalConv3d, Downsample, ResidualBlock, Upsample
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape


def new_tokenizer(shape: VideoTokenizerShape, seed: int) -> VideoTokenizer:
    """Untrained tokenizer in fp32 on the CPU; its weights depend on `shape` and `seed` alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        tokenizer = VideoTokenizer(shape)
        for module in tokenizer.modules():
            if isinstance(module, CausalConv3d):
                module.weight[:, :, :-1] = 0
            elif isinstance(module, ResidualBlock):
                nn.init.zeros_(module.residual[-1].weight)
                nn.init.zeros_(module.residual[-1].bias)
                if module.shortcut is not None:
                    _rotate(module.shortcut)
            elif isinstance(module, Downsample):
                _fold(module.resample[1])
        for module in tokenizer.modules():
            if isinstance(module, (Downsample, Upsample)) and module.time_conv is not None:
                _copy(module.time_conv)
        for module in (tokenizer.encoder.conv1, tokenizer.conv1, tokenizer.conv2, tokenizer.decoder.conv1):
            _rotate(module)
    return tokenizer


def _rotate(conv: nn.Conv3d) -> None:
    """Each place of the newest frame by itself, its channels turned by an orthogonal matrix."""
    matrix = nn.init.orthogonal_(torch.empty(conv.weight.shape[:2]))
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[:, :, -1, conv.kernel_size[1] // 2, conv.kernel_size[2] // 2] = matrix


def _fold(conv: nn.Conv2d) -> None:
    """Each 2x2 block by itself, its 4C values mapped to C by an orthogonal matrix. Gain 2 makes up for 4C -> C."""
    matrix = nn.init.orthogonal_(torch.empty(conv.out_channels, conv.in_channels * 4), gain=2.0)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[:, :, :2, :2] = matrix.unflatten(1, (-1, 2, 2))


def _copy(conv: nn.Conv3d) -> None:
    """The newest frame as it is, as often as it is asked for: the first frame, which skips this, looks no different."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    conv.weight[:, :, -1, 0, 0] = torch.eye(conv.in_channels).repeat(conv.out_channels // conv.in_channels, 1)

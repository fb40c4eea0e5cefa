"""FLOPs of training the class-to-image model, counted as `perf.flops` counts the text model's."""

from __future__ import annotations

from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.model.transformer import LEVEL_FEATURES


def image_flops(config: ClassModelConfig) -> int:
    """FLOPs that forward and backward of one image cannot do without."""
    width, bottleneck, channels = config.hidden_size, config.bottleneck_size, config.label_channels
    bits = config.classes == 2
    layer = 4 * width * width + 3 * width * config.ffn_hidden_size
    total = 4 * config.tokens * channels * bottleneck * bits  # labels of more classes are looked up
    total += 6 * config.tokens * width * (bottleneck + channels * (1 if bits else config.classes))
    total += 4 * LEVEL_FEATURES * width + 6 * width * width
    total += 6 * width * width * (6 * config.num_layers + 2)  # adaptive layer norm acts once an image
    return total + 6 * layer * sum(_lengths(config)) + 3 * _attention(config)


def image_hardware_flops(config: ClassModelConfig) -> int:
    """FLOPs that the device carries out for one image: with the attention scores, which fused kernels compute again in
    the backward pass. There is no padding."""
    return image_flops(config) + _attention(config) // 2


def _lengths(config: ClassModelConfig) -> list[int]:
    """Tokens in each block: those of the class are there from the block on where they come in."""
    return [config.tokens + (config.in_context_length if block >= config.in_context_start else 0)
            for block in range(config.num_layers)]


def _attention(config: ClassModelConfig) -> int:
    """Forward pass of attention in all blocks."""
    return sum(4 * config.hidden_size * tokens * tokens for tokens in _lengths(config))

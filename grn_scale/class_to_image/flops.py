"""FLOPs of training the class-to-image model, counted as `perf.flops` counts the text model's."""

from __future__ import annotations

from grn_scale.config.class_schema import ClassModelConfig


def image_flops(config: ClassModelConfig) -> int:
    """FLOPs of forward and backward of one image: 6 a weight and token it acts on, and 12 C s^2 a layer for attention
    over its s tokens, those of the class included from the block where they come in."""
    width, outputs = config.hidden_size, config.label_channels * (1 if config.classes == 2 else config.classes)
    layer = 4 * width * width + 3 * width * config.ffn_hidden_size
    total = 6 * config.tokens * (outputs * (width + config.bottleneck_size) + config.bottleneck_size * width)
    total += 6 * width * width * (6 * config.num_layers + 2)  # adaptive layer norm acts once an image
    for block in range(config.num_layers):
        tokens = config.tokens + (config.in_context_length if block >= config.in_context_start else 0)
        total += 6 * layer * tokens + 12 * width * tokens * tokens
    return total

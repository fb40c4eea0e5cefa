"""FLOPs of training, counted from the lengths really processed, and the peaks they are compared with."""

from __future__ import annotations

from collections.abc import Iterable

from grn_scale.config.schema import ModelConfig

PEAK_BF16 = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s by a part of the device's name, from NVIDIA's data sheets; the first part that fits counts."""


def model_flops(model: ModelConfig, samples: Iterable[tuple[int, int, int, int]]) -> int:
    """FLOPs of forward and backward of samples (visual, predicted, text tokens, tokens in all), without padding and
    without recomputation (so this gives MFU).

    6 FLOPs a weight and token it acts on; attention inside a sample of s tokens takes 12 C s^2 a layer, because it
    is bidirectional: nothing is masked away.
    """
    width, label_outputs = model.hidden_size, model.label_channels * (1 if model.classes == 2 else model.classes)
    layer = 4 * width * width + 3 * width * model.ffn_hidden_size
    total = 0
    for visual, predicted, text, tokens in samples:
        total += 6 * (model.num_layers * layer * tokens + label_outputs * width * (visual + predicted)
                      + model.text_hidden_size * width * text)
        total += 12 * model.num_layers * width * tokens * tokens
    return total


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, or None where it is not known (then there is no MFU)."""
    return next((peak for part, peak in PEAK_BF16.items()
                 if all(word in device_name for word in part.split())), None)

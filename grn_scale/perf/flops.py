"""FLOPs of training, counted from the lengths really processed, and the peaks they are compared with.

Only matrix products count, a multiply and an add as two. A weight takes 2 a token in the forward pass, 2 in the
backward pass for its own gradient and 2 for that of its input; the first layers' inputs are data and have none. All
numbers are of the whole job, however the model is cut.
"""

from __future__ import annotations

from collections.abc import Iterable

from grn_scale.config.schema import ModelConfig, ParallelConfig

Lengths = tuple[int, int, int, int]
"""Of a sample: visual, predicted and text tokens, and tokens in all."""

LEVEL_FEATURES = 256
"""Numbers that stand for a noise level at the network's input."""


def model_flops(model: ModelConfig, samples: Iterable[Lengths]) -> int:
    """FLOPs that forward and backward of the samples cannot do without (they give MFU): no padding, nothing computed
    again. Attention is bidirectional, so a query meets all tokens of its sample; layout v1's text meets text only."""
    tokens, pairs, inputs, head = _of_samples(model, samples)
    return 6 * model.num_layers * _layer_weights(model) * tokens + 3 * _attention(model, pairs) + inputs + head


def hardware_flops(model: ModelConfig, parallel: ParallelConfig, samples: Iterable[Lengths], rows: int) -> int:
    """FLOPs that the devices carry out (they give HFU): `model_flops`, and beyond it

    - the layers' linear parts on padding: rows is what all packs have, empty ones included;
    - attention scores, which fused kernels compute again in the backward pass;
    - what parallel.recompute computes again: layers, or their MLP or attention, in a second forward pass;
    - the input embedding on every tensor-parallel rank, where each has it whole.
    """
    _, pairs, inputs, head = _of_samples(model, samples)
    mlp, attends, layer = _computed_again(parallel)
    linear = 6 * _layer_weights(model) + 2 * (_layer_weights(model) * layer + _mlp_weights(model) * mlp)
    total = model.num_layers * linear * rows
    total += (7 + 2 * attends) * _attention(model, pairs) // 2
    return total + parallel.tensor * inputs + head


def _computed_again(parallel: ParallelConfig) -> tuple[bool, bool, bool]:
    """Whether the backward pass repeats the forward pass of MLPs, of core attention, of whole layers."""
    full = parallel.recompute == "full"
    modules = parallel.recompute_modules if parallel.recompute == "selective" else ()
    return "mlp" in modules, full or "core_attn" in modules, full


def _mlp_weights(model: ModelConfig) -> int:
    return 3 * model.hidden_size * model.ffn_hidden_size


def _layer_weights(model: ModelConfig) -> int:
    return 4 * model.hidden_size**2 + _mlp_weights(model)


def _attention(model: ModelConfig, pairs: int) -> int:
    """FLOPs of the forward pass of core attention, all layers: scores and weighted values."""
    return 4 * model.num_layers * model.hidden_size * pairs


def _of_samples(model: ModelConfig, samples: Iterable[Lengths]) -> tuple[int, int, int, int]:
    """(tokens, pairs of a query and a key, FLOPs of the input embedding, of the head), forward and backward."""
    width, channels = model.hidden_size, model.label_channels
    bits = model.classes == 2  # labels of more classes are looked up, and two classes need one score
    all_tokens = pairs = inputs = head = 0
    for visual, predicted, text, tokens in samples:
        all_tokens += tokens
        pairs += tokens * tokens - (text * (tokens - text) if model.layout == "v1" else 0)
        inputs += 4 * width * (visual * channels * bits + text * model.text_hidden_size)
        inputs += (4 * LEVEL_FEATURES + 6 * width) * width
        head += 6 * width * predicted * channels * (1 if bits else model.classes)
    return all_tokens, pairs, inputs, head

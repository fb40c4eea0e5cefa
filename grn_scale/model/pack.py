"""Samples as read from shards -> the packed batch on the device: labels, corruption, targets, loss weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grn_scale import batch, hbq
from grn_scale.config.schema import ModelConfig, NoiseConfig
from grn_scale.model.refinement import corrupt, signal_ratio
from grn_scale.model.sequence import Grid, lay_out
from grn_scale.model.sequence_part import part_of
from grn_scale.model.transformer import ModelInput


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: what the network reads, and what it is scored on. Where the sequence is cut over processes,
    the tokens are those of this process's part, the samples those of the whole pack.

    Legend: V visual tokens, P predicted tokens, N samples, D labels a token.
    """

    input: ModelInput
    targets_PD: torch.Tensor
    """uint8: true labels of the predicted tokens."""
    sample_P: torch.Tensor
    """int64: sample of each predicted token."""
    label_weight_N: torch.Tensor
    """fp32: loss weight of each label of a sample; sample weight / (predicted tokens * D), 0 for a corrupt one."""
    ratio_N: torch.Tensor
    """fp32: signal ratio each sample was corrupted with (reported by noise level)."""
    labels_N: torch.Tensor
    """fp32: scored labels of each sample; 0 for a corrupt one."""


def sample_labels(sample: batch.Sample, config: ModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """True labels uint8 [visual tokens, D] of one sample on `device`, in the model's label form."""
    packed = torch.from_numpy(sample.bits).to(device, non_blocking=True)
    bits = hbq.unpack_on_device(packed, (sample.draw.visual_tokens, config.bits_per_token))
    return bits if config.label_form == "bit" else hbq.bits_to_index(bits, config.rounds)


def assemble(samples: Sequence[batch.Sample], weights: Mapping[int, float], *, config: ModelConfig,
             noise: NoiseConfig, seed: int, length: int, device: torch.device,
             part: tuple[int, int] = (0, 1)) -> PackedBatch:
    """The packed batch of one pack's samples, padded to `length` rows; of part[1] equal parts of it, part part[0].

    weights: loss weight of each draw index, normalised over the global batch. An empty pack is a sequence of
    padding. All noise is keyed by (seed, draw index, label index).
    """
    draws = [sample.draw for sample in samples]
    grids = [Grid(d.thw, d.ratio_key, d.text_tokens, d.task == "I2V") for d in draws]
    layout = lay_out(grids, config.layout, config.head_size, length)
    own = part_of(layout, *part).to(device) if part[1] > 1 else None
    layout = layout.to(device)
    ratios = [signal_ratio(seed, d.index, noise) for d in draws]
    channels = config.label_channels
    if samples:
        labels = torch.cat([sample_labels(s, config, device) for s in samples])
        text = torch.cat([s.text_states for s in samples]).to(device)
    else:
        labels = torch.zeros(0, channels, dtype=torch.uint8, device=device)
        text = torch.zeros(0, config.text_hidden_size, device=device)
    mixed, share = corrupt(labels, layout, ratios, [d.index for d in draws], seed, config.classes)
    ratio = torch.tensor(ratios, dtype=torch.float32, device=device)
    scored = torch.tensor([s.valid * s.draw.predicted_tokens * channels for s in samples], dtype=torch.float32,
                          device=device)
    weight = torch.tensor([weights[d.index] if s.valid else 0.0 for s, d in zip(samples, draws)],
                          dtype=torch.float64, device=device)
    level, predicted = share if config.layout == "v2" else ratio, layout.predicted
    if own:
        mixed, text, level, predicted = mixed[own.visual], text[own.text], level[own.level], predicted[own.predicted]
    return PackedBatch(
        input=ModelInput(layout, mixed, text, level, own),
        targets_PD=labels[predicted], sample_P=layout.visual_sample[predicted],
        label_weight_N=(weight / scored.double().clamp(min=1)).float(), ratio_N=ratio, labels_N=scored)

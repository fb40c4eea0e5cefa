"""Samples as read from shards -> the batch of images on the device: labels, corruption, classes, loss weights.

All that is random is keyed by (seed, draw index, label index), so a draw is the same in any batch on any layout.

Legend: B images, N tokens an image, P = B * N, D labels a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from grn_scale import keyed
from grn_scale.batch import Draw, Sample
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.schema import NoiseConfig
from grn_scale.errors import UserError
from grn_scale.model.loss import LabelLoss, label_loss
from grn_scale.model.pack import sample_labels
from grn_scale.model.refinement import signal_ratio


@dataclass(frozen=True)
class ClassBatch:
    """One micro-batch: what the network reads, and what it is scored on."""

    labels: torch.Tensor
    """uint8 [B, D, h, w]: mixed labels."""
    class_B: torch.Tensor
    """int64: class ids, the null class where the draw goes without."""
    targets_PD: torch.Tensor
    """uint8: true labels."""
    sample_P: torch.Tensor
    """int64: image of each token."""
    label_weight_N: torch.Tensor
    """fp32 [B]: loss weight of each label of an image; image weight / (N * D), 0 for a corrupt one."""
    ratio_N: torch.Tensor
    """fp32 [B]: signal ratio that each image was corrupted with, which the network reads."""
    labels_N: torch.Tensor
    """fp32 [B]: scored labels of each image; 0 for a corrupt one."""


def assemble(samples: Sequence[Sample], weights: Mapping[int, float], *, class_of: Callable[[Draw], int | None],
             config: ClassModelConfig, noise: NoiseConfig, class_drop: float, seed: int,
             device: torch.device) -> ClassBatch:
    """The batch of these samples; an empty list gives an empty batch.

    weights: loss weight of each draw index, normalised over the global batch. class_of: class id of a draw.
    class_drop: probability that a draw goes without its class. UserError naming a sample that is not an image of the
    model's size, or has no class that the model knows.
    """
    draws = [sample.draw for sample in samples]
    classes = [_class(draw, class_of(draw), config, seed, class_drop) for draw in draws]
    ratios = [signal_ratio(seed, draw.index, noise) for draw in draws]
    shape = (len(samples), config.tokens, config.label_channels)
    if samples:
        labels = torch.stack([sample_labels(sample, config, device) for sample in samples])
    else:
        labels = torch.zeros(shape, dtype=torch.uint8, device=device)
    mixed = corrupt(labels, ratios, [draw.index for draw in draws], seed, config.classes)
    valid = torch.tensor([float(sample.valid) for sample in samples], dtype=torch.float64, device=device)
    weight = torch.tensor([weights[draw.index] for draw in draws], dtype=torch.float64, device=device) * valid
    per_image = config.tokens * config.label_channels
    return ClassBatch(
        labels=mixed.transpose(1, 2).unflatten(2, (config.grid, config.grid)),
        class_B=torch.tensor(classes, dtype=torch.int64, device=device), targets_PD=labels.flatten(0, 1),
        sample_P=torch.arange(len(samples), device=device).repeat_interleave(config.tokens),
        label_weight_N=(weight / per_image).float(),
        ratio_N=torch.tensor(ratios, dtype=torch.float32, device=device), labels_N=(valid * per_image).float())


def corrupt(labels_BND: torch.Tensor, ratios: Sequence[float], draws: Sequence[int], seed: int,
            classes: int) -> torch.Tensor:
    """uint8 [B, N, D]: each label stays with its image's probability, else becomes uniformly random (and may hit the
    truth). The numbers are those of `model.refinement.corrupt`, for images of one size."""
    device, (_, tokens, channels) = labels_BND.device, labels_BND.shape

    def random(purpose: str) -> torch.Tensor:
        values = [keyed.as_int64(keyed.key64(seed, purpose, draw)) for draw in draws]
        keys = torch.tensor(values, dtype=torch.int64, device=device)[:, None, None]
        return keyed.hash32(keys, torch.arange(tokens * channels, device=device).view(tokens, channels))

    threshold = torch.tensor([int(p * 2**32) for p in ratios], dtype=torch.int64, device=device)
    noise = random("noise") >> (32 - classes.bit_length() + 1)
    return torch.where(random("keep") < threshold[:, None, None], labels_BND, noise.to(torch.uint8))


def batch_loss(model: ClassGRN, batch: ClassBatch) -> LabelLoss:
    """What a batch is scored with (see `LabelLoss`); of an empty one zeros that every parameter is part of."""
    scores = model(batch.labels, batch.ratio_N, batch.class_B)
    return label_loss(scores, batch.targets_PD, batch.sample_P, batch.label_weight_N)


def check_image(key: str, thw: tuple[int, int, int], class_id: int | None, config: ClassModelConfig) -> None:
    """UserError, naming the sample, unless it is an image of the model's size with a class that the model knows."""
    if tuple(thw) != (1, config.grid, config.grid):
        t, h, w = thw
        raise UserError(f"sample {key} is {t} x {h} x {w} latents, but this model takes images of {config.grid} x "
                        f"{config.grid}: tokenize square images with tokenize.max_frames=1 and "
                        f"tokenize.latent_side={config.grid}, or set model.grid")
    if class_id is None:
        raise UserError(f"sample {key} has no class_id, which this model trains on: give it one in the manifest")
    if not 0 <= class_id < config.num_classes:
        raise UserError(f"sample {key} is of class {class_id}, but model.num_classes is {config.num_classes}")


def _class(draw: Draw, class_id: int | None, config: ClassModelConfig, seed: int, class_drop: float) -> int:
    check_image(draw.key, draw.thw, class_id, config)
    dropped = class_drop > 0 and keyed.uniform(seed, "class drop", draw.index) < class_drop
    return config.null_class if dropped else class_id

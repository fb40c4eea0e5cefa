"""What the class-to-image model is trained on in the parity tests: batches of random images with classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from grn_scale.batch import Draw, Sample
from grn_scale.class_to_image.batch import ClassBatch, assemble
from grn_scale.config.class_schema import ClassConfig, ClassModelConfig
from grn_scale.config.schema import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig, ZeroConfig

BATCHES = 4
MODEL = ClassModelConfig(hidden_size=32, num_layers=3, num_heads=4, bottleneck_size=8, in_context_length=2,
                         in_context_start=1, num_classes=5, grid=3, latent_channels=4, rounds=2)


def class_parity_config(*, optimizer: str = "adamw", precision: str = "fp32", stage: int = 1, form: str = "bit",
                        seed: int = 6, lr: float | None = None, clip_norm: float = 0.05) -> ClassConfig:
    """Clipping is active: gradient norms of this model lie above 0.08."""
    settings = OptimizerConfig(name=optimizer, lr=lr or (1e-3 if optimizer == "adamw" else 0.1), clip_norm=clip_norm,
                               ema_decay=0.9, weight_decay=0.1)
    return ClassConfig(seed=seed, model=dataclasses.replace(MODEL, label_form=form),
                       data=DataConfig(token_budget=128, packs_per_step=BATCHES), optimizer=settings,
                       schedule=ScheduleConfig(warmup_steps=0), train=TrainConfig(precision=precision),
                       zero=ZeroConfig(stage=stage))


def class_batches_of_step(step: int, config: ClassConfig, chosen: Sequence[int], empty: bool) -> list[ClassBatch]:
    """The chosen ones of a step's BATCHES batches of 2 to 5 images each; with `empty` every second one has none."""
    rng = np.random.default_rng([config.seed, step])
    batches: list[list[Sample]] = []
    index = step * 1000
    for number in range(BATCHES):
        batches.append([])
        for _ in range(0 if empty and number % 2 else int(rng.integers(2, 6))):
            side = config.model.grid
            draw = Draw(index, f"k{index}", index, (1, side, side), 1.0, "T2I", -1, 1)
            bits = rng.integers(0, 256, config.model.tokens * config.model.bits_per_token // 8, dtype=np.uint8)
            batches[-1].append(Sample(draw, bits, torch.zeros(1, 4)))
            index += 1
    draws = [sample.draw.index for batch in batches for sample in batch]
    weights = {draw: 1 / len(draws) for draw in draws}
    return [assemble(batches[i], weights, class_of=lambda draw: draw.row % config.model.num_classes,
                     config=config.model, noise=config.noise, class_drop=0.1, seed=config.seed,
                     device=torch.device("cpu")) for i in chosen]

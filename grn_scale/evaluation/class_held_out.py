"""Held-out images of a class-to-image model: loss and accuracy by noise, and whether training and sampling agree."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from grn_scale.class_to_image.batch import ClassBatch, assemble, batch_loss
from grn_scale.class_to_image.guidance import predict
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.source import load_trained
from grn_scale.config.class_schema import ClassConfig
from grn_scale.data.dataset import Dataset
from grn_scale.data.loader import read_pack
from grn_scale.data.plan import sample_weights
from grn_scale.evaluation.held_out import verdict
from grn_scale.evaluation.held_out_datasets import measure_datasets, open_held_out, validation_plan
from grn_scale.model.loss import NOISE_BINS, noise_bin_means, noise_bin_sums
from grn_scale.sampling.source import Source


def measure_held_out_classes(source: Source, config: ClassConfig, options: argparse.Namespace) -> dict[str, Any]:
    """What `held_out.measure` gives, for a class-to-image model: `by_noise` and `agreement` of the source's model in
    train.precision (options: packs, raw).

    ConfigError where the held-out samples are not those of the training; UserError where the dataset cannot be read,
    was made with another tokenizer, or holds what is no image of the model's size and classes.
    """
    datasets = open_held_out(source, config, options.packs)
    model, weights = load_trained(source, config, raw=options.raw)

    def measure_one(dataset: Dataset) -> dict[str, Any]:
        batches = held_out_batches(dataset, config, model, options.packs)
        return {**by_noise(model, batches),
                "training_and_sampling": agreement(model, batches, config.train.precision)}

    return {"weights": weights, "precision": config.train.precision,
            **measure_datasets(datasets, config, measure_one)}


def held_out_batches(dataset: Dataset, config: ClassConfig, model: ClassGRN, packs: int) -> list[ClassBatch]:
    """The first packs of the dataset's validation split, on the model's device, each with its class.

    Their noise is keyed by fixed draws, as in validation. ConfigError where nothing is held out.
    """
    chosen = validation_plan(dataset, config).first_packs(packs)
    weights = sample_weights(chosen, config.loss.gamma)
    return [assemble(read_pack(dataset, pack), weights, class_of=lambda draw: dataset.locate(draw.row).class_id,
                     config=model.config, noise=config.noise, class_drop=0.0, seed=config.seed, device=model.device)
            for pack in chosen]


@torch.inference_mode()
def by_noise(model: ClassGRN, batches: list[ClassBatch]) -> dict[str, Any]:
    """Loss (nats a label), share of right labels, and both by signal ratio in NOISE_BINS equal bins (None: no sample
    there)."""
    loss, bins = 0.0, torch.zeros(NOISE_BINS, 3, dtype=torch.float64)
    for batch in batches:
        result = batch_loss(model, batch)
        loss += result.weighted.item()
        bins += noise_bin_sums(result, batch.ratio_N, batch.labels_N).cpu()
    return {"packs": len(batches), "samples": sum(len(batch.class_B) for batch in batches), "loss": loss,
            "bit_accuracy": (bins[:, 1].sum() / bins[:, 2].sum().clamp(min=1)).item(), **noise_bin_means(bins)}


@torch.inference_mode()
def agreement(model: ClassGRN, batches: list[ClassBatch], precision: str) -> dict[str, Any]:
    """How far the scores of the same images lie apart when they come as a training batch and one by one to the sampler,
    beside their unconditional branch.

    Largest difference over all images, the largest standard deviation of a batch's scores for comparison, and the
    `verdict` on both.
    """
    largest, spread, samples = 0.0, 0.0, 0
    for batch in batches:
        together = model(batch.labels, batch.ratio_N, batch.class_B)
        spread = max(spread, together.std().item())
        times = batch.ratio_N.cpu()
        for n, scores in enumerate(together.split(model.config.tokens)):
            one = slice(n, n + 1)
            alone = predict(model, batch.labels[one], times[one], batch.class_B[one], torch.ones(1), always_both=True)
            largest = max(largest, (alone.scores - scores).abs().max().item())
        samples += len(batch.class_B)
    return verdict(samples, largest, spread, precision)

"""Held-out samples of a dataset: loss and bit accuracy by noise, and whether training and sampling agree on them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from grn_scale.batch import Sample
from grn_scale.config.check import check_set
from grn_scale.config.schema import Config, ModelConfig
from grn_scale.data.loader import read_pack
from grn_scale.data.plan import Plan, sample_weights
from grn_scale.data.shards import Dataset
from grn_scale.errors import ConfigError
from grn_scale.evaluation.job import Job
from grn_scale.model import GRN
from grn_scale.model.loss import NOISE_BINS, label_loss, noise_bin_means, noise_bin_sums
from grn_scale.model.pack import PackedBatch, assemble
from grn_scale.sampling.condition import Condition
from grn_scale.sampling.guidance import GuidedNetwork


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --held-out."""
    parser.add_argument("--held-out", action="store_true", help="loss and bit accuracy by noise level on the held-out "
                        "samples of data.dataset, and whether training and sampling score them alike")
    parser.add_argument("--packs", type=int, default=8, metavar="N", help="held-out packs (default: 8)")


def measure(job: Job) -> dict[str, Any]:
    """`by_noise` and `agreement` of the checkpoint's model in train.precision."""
    source, config, options = job.checkpoint("--held-out"), job.config, job.options
    check_set(config, "data.dataset")
    if options.packs < 1:
        raise ConfigError(f"--packs is {options.packs}, but must be at least 1")
    dataset = Dataset.open(config.data.dataset)
    source.check_fingerprint("tokenizer", "data.dataset", dataset.info.tokenizer_fingerprint)
    source.check_fingerprint("text", "data.dataset", dataset.info.text_fingerprint)
    trained_with = source.state.get("config", {}).get("data", {}).get("validation_fraction")
    if trained_with is not None and config.data.validation_fraction > trained_with:
        raise ConfigError(f"data.validation_fraction is {config.data.validation_fraction:g}, but {source.checkpoint} "
                          f"was trained with {trained_with:g}: some of these samples were trained on, give at most "
                          "that")
    trained = source.load(raw=options.raw)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = trained.model.to("cuda" if torch.cuda.is_available() else "cpu", dtype)
    packs = held_out_packs(dataset, config, model, options.packs)
    return {"weights": trained.weights, "precision": config.train.precision, **by_noise(model, packs),
            "training_and_sampling": agreement(model, packs)}


@dataclass(frozen=True, eq=False)
class HeldOutPack:
    samples: list[Sample]
    batch: PackedBatch
    """The same, corrupted and packed as validation in training does it."""


def held_out_packs(dataset: Dataset, config: Config, model: GRN, packs: int) -> list[HeldOutPack]:
    """The first packs of the dataset's validation split, on the model's device.

    Their noise is keyed by fixed draws, as in validation. ConfigError where nothing is held out.
    """
    plan = Plan.of(dataset, config.data, config.seed, split="validation")
    chosen, _ = plan.next_step(plan.start(), min(packs, plan.packs_in_epoch(0)))
    weights = sample_weights(chosen, config.loss.gamma)
    found = []
    for pack in chosen:
        samples = read_pack(dataset, pack)
        found.append(HeldOutPack(samples, assemble(
            samples, weights, config=model.config, noise=config.noise, seed=config.seed,
            length=config.data.token_budget, device=model.word_embed.weight.device)))
    return found


@torch.inference_mode()
def by_noise(model: GRN, packs: list[HeldOutPack]) -> dict[str, Any]:
    """Loss (nats a label), bit accuracy, and both by signal ratio in NOISE_BINS equal bins (None: no sample there)."""
    loss, bins = 0.0, torch.zeros(NOISE_BINS, 3, dtype=torch.float64)
    for batch in (pack.batch for pack in packs):
        result = label_loss(model(batch.input), batch.targets_PD, batch.sample_P, batch.label_weight_N)
        loss += result.weighted.item()
        bins += noise_bin_sums(result, batch.ratio_N, batch.labels_N).cpu()
    return {"packs": len(packs), "samples": sum(len(pack.samples) for pack in packs), "loss": loss,
            "bit_accuracy": (bins[:, 1].sum() / bins[:, 2].sum().clamp(min=1)).item(), **noise_bin_means(bins)}


@torch.inference_mode()
def agreement(model: GRN, packs: list[HeldOutPack]) -> dict[str, Any]:
    """How far the scores of the same tokens lie apart when they come as a training pack and one by one to the sampler.

    Largest difference over all samples, and the largest standard deviation of a pack's scores for comparison.
    """
    largest, spread, samples = 0.0, 0.0, 0
    for pack in packs:
        x, batch = pack.batch.input, pack.batch
        packed = model(x)
        visual = x.labels_VD.split([sample.draw.visual_tokens for sample in pack.samples])
        spread = max(spread, packed.std().item())
        for n, (sample, labels) in enumerate(zip(pack.samples, visual)):
            network = GuidedNetwork(model, [_condition(sample, labels, model.config)])
            mixed = labels[len(labels) - sample.draw.predicted_tokens:]
            alone = network(mixed, [x.level_N[n].item()], [1.0]).scores
            largest = max(largest, (alone - packed[batch.sample_P == n]).abs().max().item())
            samples += 1
    return {"samples": samples, "largest_score_difference": largest, "score_standard_deviation": spread}


def _condition(sample: Sample, labels_VD: torch.Tensor, config: ModelConfig) -> Condition:
    draw = sample.draw
    frame = draw.visual_tokens - draw.predicted_tokens
    first = None
    if frame:
        first = labels_VD[:frame].t().reshape(config.label_channels, 1, *draw.thw[1:])
    return Condition(sample.text_states, None, draw.thw, draw.ratio_key, first)


def table(result: dict[str, Any]) -> list[str]:
    """Lines for people."""
    same = result["training_and_sampling"]
    return [f"held out     {result['samples']} samples in {result['packs']} packs: loss {result['loss']:.4f} nats a "
            f"label, bit accuracy {result['bit_accuracy']:.2%}",
            "p            " + "  ".join(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)),
            "loss         " + "  ".join(_number(value) for value in result["loss_by_noise"]),
            "accuracy     " + "  ".join(_number(value) for value in result["bit_accuracy_by_noise"]),
            f"agreement    scores of {same['samples']} samples differ by at most "
            f"{same['largest_score_difference']:.2e} between training and sampling (standard deviation "
            f"{same['score_standard_deviation']:.2f})"]


def _number(value: float | None) -> str:
    return "   -   " if value is None else f"{value:7.3f}"

"""Held-out samples of datasets: loss and bit accuracy by noise, and whether training and sampling agree on them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grn_scale.batch import Sample
from grn_scale.config.check import check_set
from grn_scale.config.schema import Config, ModelConfig
from grn_scale.data.dataset import Dataset
from grn_scale.data.loader import read_pack
from grn_scale.data.plan import sample_weights
from grn_scale.errors import ConfigError
from grn_scale.evaluation.held_out_datasets import measure_datasets, open_held_out, validation_plan
from grn_scale.evaluation.job import Job
from grn_scale.evaluation.text_precision import int8_text_states
from grn_scale.model import GRN
from grn_scale.model.loss import NOISE_BINS, label_loss, noise_bin_means, noise_bin_sums
from grn_scale.model.pack import PackedBatch, assemble
from grn_scale.sampling.condition import Condition
from grn_scale.sampling.guidance import GuidedNetwork
from grn_scale.tokenizer.text import IdsEncoder, load_text_encoder, with_text_states

log = logging.getLogger(__name__)

ALLOWED = {"fp32": 1e-4, "bf16": 0.1}
"""How far scores of standard deviation 1 may lie apart by rounding alone, by precision.

Two attention kernels put bf16 scores of a random network of 24 blocks 0.04 apart at most; more samples and blocks find
a larger maximum.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of --held-out."""
    parser.add_argument("--held-out", action="store_true", help="loss and bit accuracy by noise level on the held-out "
                        "samples of data.dataset or data.mixture, and whether training and sampling score them alike")
    parser.add_argument("--packs", type=int, default=8, metavar="N", help="held-out packs of each dataset (default: 8)")


def verdict(samples: int, largest: float, spread: float, precision: str) -> dict[str, Any]:
    """Whether scores that differ by at most `largest` and have the standard deviation `spread` agree in a precision.

    A warning says where they do not: then what was trained is not what is sampled from.
    """
    allowed = ALLOWED[precision] * max(1.0, spread)
    agree = largest <= allowed
    if not agree:
        log.warning("training and sampling score the same samples by up to %.3g apart (in %s %.3g are rounding): one "
                    "of them computes another model; loss and accuracy say nothing about the samples", largest,
                    precision, allowed)
    return {"samples": samples, "agree": agree, "largest_score_difference": largest, "score_standard_deviation": spread}


def measure(job: Job) -> dict[str, Any]:
    """`by_noise` and `agreement` of the checkpoint's model in train.precision."""
    source, config, options = job.checkpoint("--held-out"), job.config, job.options
    datasets = open_held_out(source, config, options.packs)
    source.check_fingerprint("text", "data.mixture" if config.data.mixture else "data.dataset",
                             datasets[0].info.text_fingerprint)
    trained = source.load(raw=options.raw)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device, dtype)
    encoder = open_text_encoder(datasets, config, device)

    def measure_one(dataset: Dataset) -> dict[str, Any]:
        packs = held_out_packs(dataset, config, model, options.packs, encoder)
        return {**by_noise(model, packs), "training_and_sampling": agreement(model, packs, config.train.precision),
                "int8_text_states": int8_text_states(model, [pack.batch for pack in packs])}

    return {"weights": trained.weights, "precision": config.train.precision,
            **measure_datasets(datasets, config, measure_one)}


def open_text_encoder(datasets: Sequence[Dataset], config: Config, device: torch.device) -> IdsEncoder | None:
    """The encoder of the datasets' texts where one holds token ids only. ConfigError where text.encoder is another."""
    lacking = next((dataset for dataset in datasets if dataset.info.text_states == "none"), None)
    if lacking is None:
        return None
    check_set(config, "text.encoder")
    encoder = load_text_encoder(config.text.encoder, config.text.max_tokens, device)
    if encoder.fingerprint != lacking.info.text_fingerprint:
        raise ConfigError(f"{lacking.storage.location} was made with the text encoder "
                          f"{lacking.info.text_fingerprint[:16]}, but text.encoder and text.max_tokens="
                          f"{config.text.max_tokens} give {encoder.fingerprint[:16]}: set both as they were when it "
                          "was tokenized")
    return encoder


@dataclass(frozen=True, eq=False)
class HeldOutPack:
    samples: list[Sample]
    batch: PackedBatch
    """The same, corrupted and packed as validation in training does it."""


def held_out_packs(dataset: Dataset, config: Config, model: GRN, packs: int,
                   encoder: IdsEncoder | None) -> list[HeldOutPack]:
    """The first packs of the dataset's validation split, on the model's device; encoder: for texts without states.

    Their noise is keyed by fixed draws, as in validation. ConfigError where nothing is held out.
    """
    chosen = validation_plan(dataset, config).first_packs(packs)
    weights = sample_weights(chosen, config.loss.gamma)
    found = []
    for pack in chosen:
        samples = read_pack(dataset, pack)
        if dataset.info.text_states == "none":
            samples = with_text_states(samples, encoder)
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
def agreement(model: GRN, packs: list[HeldOutPack], precision: str) -> dict[str, Any]:
    """How far the scores of the same tokens lie apart when they come as a training pack and one by one to the sampler.

    Largest difference over all samples, the largest standard deviation of a pack's scores for comparison, and the
    `verdict` on both.
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
    return verdict(samples, largest, spread, precision)


def _condition(sample: Sample, labels_VD: torch.Tensor, config: ModelConfig) -> Condition:
    draw = sample.draw
    frame = draw.visual_tokens - draw.predicted_tokens
    first = None
    if frame:
        first = labels_VD[:frame].t().reshape(config.label_channels, 1, *draw.thw[1:])
    return Condition(sample.text_states, None, draw.thw, draw.ratio_key, first)


def table(result: dict[str, Any]) -> list[str]:
    """Lines for people; of a mixture one for each dataset, after those of all together."""
    same = result["training_and_sampling"]
    lines = [f"held out     {_summary(result)}",
             "p            " + "  ".join(f"{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)),
             "loss         " + "  ".join(_number(value) for value in result["loss_by_noise"]),
             "accuracy     " + "  ".join(_number(value) for value in result["bit_accuracy_by_noise"]),
             f"agreement    {'yes' if same['agree'] else 'NO'}: scores of {same['samples']} samples differ by at most "
             f"{same['largest_score_difference']:.2e} between training and sampling (standard deviation "
             f"{same['score_standard_deviation']:.2f})"]
    if int8 := result.get("int8_text_states"):
        lines.append(f"int8 text    scores change by {int8['relative_l2']:.2%} (relative L2), at most "
                     f"{int8['largest_score_difference']:.2e}, where text states are kept as int8")
    for part in result.get("datasets", ()):
        found = f"{_summary(part)}, agreement {'yes' if part['training_and_sampling']['agree'] else 'NO'}" if (
            part["samples"]) else "holds no sample out"
        lines.append(f"  of {part['dataset']}: {found}")
    return lines


def _summary(result: dict[str, Any]) -> str:
    return (f"{result['samples']} samples in {result['packs']} packs: loss {result['loss']:.4f} nats a label, bit "
            f"accuracy {result['bit_accuracy']:.2%}")


def _number(value: float | None) -> str:
    return "   -   " if value is None else f"{value:7.3f}"

"""The datasets whose held-out samples are measured: one, or all of a mixture, each for itself and all together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from grn_scale.config.check import check_set
from grn_scale.config.schema import Config
from grn_scale.data.dataset import Dataset
from grn_scale.data.mixture import Mixture, Visits
from grn_scale.data.plan import Plan
from grn_scale.data.split import held_out_samples
from grn_scale.errors import ConfigError
from grn_scale.sampling.source import Source

log = logging.getLogger(__name__)


def open_held_out(source: Source, config: Config, packs: int) -> tuple[Dataset, ...]:
    """The datasets of the configuration, once their held-out samples are known to be those of the source's training.

    ConfigError where they are not, nothing is held out, the datasets of a mixture do not go together, or `packs` is
    none; UserError where a dataset cannot be read or was made with another tokenizer.
    """
    data = config.data
    if not data.mixture:
        check_set(config, "data.dataset")
    if packs < 1:
        raise ConfigError(f"--packs is {packs}, but must be at least 1")
    mixture = Mixture.open(replace(data, image_share=None))
    field = "data.mixture" if data.mixture else "data.dataset"
    source.check_fingerprint("tokenizer", field, mixture.info.tokenizer_fingerprint)
    trained_with = source.state.get("config", {}).get("data", {}).get("validation_fraction")
    if trained_with is not None and data.validation_fraction > trained_with:
        raise ConfigError(f"data.validation_fraction is {data.validation_fraction:g}, but {source.checkpoint} was "
                          f"trained with {trained_with:g}: some of these samples were trained on, give at most that")
    Plan.of(mixture, data, config.seed, split="validation")  # refuses what holds nothing out, before a model is read
    return mixture.datasets


def validation_plan(dataset: Dataset, config: Config) -> Plan:
    """Plan of the held-out samples of one dataset, each of which it visits once. ConfigError where there are none."""
    return Plan.of(Mixture((dataset,), (Visits(),)), config.data, config.seed, split="validation")


def measure_datasets(datasets: Sequence[Dataset], config: Config,
                     measure: Callable[[Dataset], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` gives for the one dataset. Of a mixture the `overall` of all, and under `datasets` what it gives
    for each, with its folder as `dataset`; one that holds nothing out has no `samples` and no more than that."""
    if not config.data.mixture:
        return measure(datasets[0])
    found: list[dict[str, Any]] = []
    for part, dataset in zip(config.data.mixture, datasets):
        if _holds_out(dataset, config.data.validation_fraction):
            found.append({"dataset": part.dataset, **measure(dataset)})
        else:
            log.warning("%s holds no sample out at data.validation_fraction %g: nothing is measured on it",
                        part.dataset, config.data.validation_fraction)
            found.append({"dataset": part.dataset, "samples": 0})
    return {**overall([part for part in found if part["samples"]]), "datasets": found}


def overall(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One measurement out of those of several datasets (one or more): counts add up, loss, accuracy and relative change
    are means in which each dataset counts with its samples, differences are the largest.

    A noise bin's mean is over the datasets that have samples there (None where none has).
    """
    samples = [part["samples"] for part in parts]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [(value, count) for value, count in zip(values, samples) if value is not None]
        return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None

    same = [part["training_and_sampling"] for part in parts]
    result = {
        "packs": sum(part["packs"] for part in parts), "samples": sum(samples),
        **{name: mean([part[name] for part in parts]) for name in ("loss", "bit_accuracy")},
        **{name: [mean(values) for values in zip(*(part[name] for part in parts))]
           for name in ("loss_by_noise", "bit_accuracy_by_noise")},
        "training_and_sampling": {
            "samples": sum(each["samples"] for each in same), "agree": all(each["agree"] for each in same),
            **{name: max(each[name] for each in same)
               for name in ("largest_score_difference", "score_standard_deviation")}}}
    int8 = [part["int8_text_states"] for part in parts if "int8_text_states" in part]
    if int8:
        result["int8_text_states"] = {
            "relative_l2": mean([each["relative_l2"] for each in int8]),
            "largest_score_difference": max(each["largest_score_difference"] for each in int8)}
    return result


def _holds_out(dataset: Dataset, fraction: float) -> bool:
    return any(held_out_samples(dataset.columns(shard).key_hash, fraction).any()
               for shard in range(len(dataset.info.video_shards)))

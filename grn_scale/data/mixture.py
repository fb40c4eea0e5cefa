"""The datasets a run reads, and how often an epoch visits their samples. One dataset is a mixture of itself.

All that is said here follows from the summaries of the datasets' indexes: nothing takes a look at single samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from grn_scale.batch import Draw
from grn_scale.config.data_schema import DataConfig, MixturePart
from grn_scale.data.schema import DatasetInfo, IndexRow
from grn_scale.errors import ConfigError
from grn_scale.keyed import key64, uniforms

if TYPE_CHECKING:
    from grn_scale.data.columns import ShardColumns

DIGITS = 9
"""Visits that follow from shares are rounded to so many decimals: what means 1 should not be a little more."""
SHARD_SUMS = np.dtype([("samples", np.int64), ("images", np.int64), ("tokens", np.int64), ("longest", np.int64)])
"""What a summary says of a video shard."""


class Index(Protocol):
    """What a plan needs of a dataset (grn_scale.data.dataset.Dataset has it)."""

    @property
    def snapshot(self) -> str: ...

    @property
    def info(self) -> DatasetInfo: ...

    def columns(self, shard: int) -> ShardColumns: ...


@dataclass(frozen=True)
class Visits:
    """How often an epoch visits each image and each video of a dataset: r times, or with a fraction floor(r) or
    ceil(r) times. Which samples get the extra visit is drawn anew for every epoch by (seed, epoch, key)."""

    images: float = 1.0
    videos: float = 1.0

    def of(self, columns: ShardColumns, seed: int, epoch: int) -> np.ndarray:
        """int64 [n]: visits of each sample of a shard in an epoch."""
        visits = np.where(columns.thw[:, 0] == 1, self.images, self.videos)
        whole = np.floor(visits)
        return (whole + (uniforms(key64(seed, "extra visit", epoch), columns.key_hash) < visits - whole)).astype(int)

    def repeats(self, shards: np.ndarray) -> np.ndarray:
        """int64 [shards]: most visits a sample of each shard (`Mixture.shards`) can have."""
        samples, images = shards["samples"], shards["images"]
        most = np.where(images > 0, math.ceil(self.images), 0)
        return np.where(samples > 0, np.maximum(most, np.where(images < samples, math.ceil(self.videos), 0)), 0)


@dataclass(frozen=True)
class Mixture:
    """Datasets that are read together. Raises ConfigError where no one model could read them."""

    datasets: tuple[Index, ...]
    visits: tuple[Visits, ...]
    """For each dataset."""
    folders: tuple[str, ...] = ()
    """Where the datasets lie; empty for those in memory."""

    def __post_init__(self) -> None:
        first = _must_be_same(self.info)
        for number, dataset in enumerate(self.datasets[1:], 1):
            for name, value in _must_be_same(dataset.info).items():
                if value != first[name]:
                    raise ConfigError(
                        f"data.mixture: {self.name(0)} and {self.name(number)} do not go together: {name} is "
                        f"{first[name]} in the one and {value} in the other. Tokenize both with the same settings, or "
                        "leave one out")

    @classmethod
    def of(cls, source: Mixture | Index, image_share: float | None = None) -> Mixture:
        """A mixture as it is; an index alone as the mixture of itself, each sample visited once (or as image_share
        has it)."""
        if isinstance(source, Mixture):
            return source
        return cls((source,), tuple(scale_images([Visits()], [_counts(source)], image_share)))

    @classmethod
    def open(cls, data: DataConfig, snapshot: str = "", check_files: bool = True) -> Mixture:
        """The datasets that a data section names, at their newest state or at the one that `snapshot` names.

        Raises ConfigError where they do not go together, or a dataset does not hold its snapshot any more; UserError
        where one cannot be opened.
        """
        from grn_scale.data.block_cache import DiskBlocks
        from grn_scale.data.dataset import Dataset

        parts = data.parts
        ids = snapshot.split(",") if snapshot else [""] * len(parts)
        if len(ids) != len(parts):
            raise ConfigError(f"the data state is of {len(ids)} datasets, but the configuration names {len(parts)}: "
                              "keep data.dataset or data.mixture as it was until the epoch ends, or start a new run "
                              "from the weights")
        for part, wanted in zip(parts, ids):
            _check_snapshot(part.dataset, wanted)
        cache = DiskBlocks.of(data)
        datasets = tuple(Dataset.open(part.dataset, snapshot=wanted, check_files=check_files, cache=cache)
                         for part, wanted in zip(parts, ids))
        counts = [_counts(dataset) for dataset in datasets]
        visits = scale_images(dataset_visits(parts, [sum(count) for count in counts], data.temperature), counts,
                              data.image_share)
        return cls(datasets, tuple(visits), tuple(part.dataset for part in parts))

    @property
    def snapshot(self) -> str:
        """Name of this state of all datasets: their snapshots, joined by commas."""
        return ",".join(dataset.snapshot for dataset in self.datasets)

    @property
    def info(self) -> DatasetInfo:
        """Of the first dataset; the others agree in what a model depends on."""
        return self.datasets[0].info

    @property
    def infos(self) -> tuple[DatasetInfo, ...]:
        return tuple(dataset.info for dataset in self.datasets)

    @property
    def samples(self) -> int:
        """Of all datasets together."""
        return sum(int(shards["samples"].sum()) for shards in self.shards)

    @property
    def expected_visits(self) -> float:
        """Visits of an epoch, on average over epochs and with the held-out samples counted in."""
        images = [int(shards["images"].sum()) for shards in self.shards]
        videos = [int(shards["samples"].sum()) - count for shards, count in zip(self.shards, images)]
        return sum(each.images * a + each.videos * b for each, a, b in zip(self.visits, images, videos))

    @functools.cached_property
    def shards(self) -> tuple[np.ndarray, ...]:
        """For each dataset what its summary says of the video shards: SHARD_SUMS [shards]."""
        return tuple(np.array([(s.samples, s.images, s.tokens, s.longest) for s in dataset.info.video_shards],
                              SHARD_SUMS) for dataset in self.datasets)

    @functools.cached_property
    def first_rows(self) -> tuple[np.ndarray, ...]:
        """For each dataset the row that each shard starts with, int64 [shards]."""
        return tuple(np.cumsum(shards["samples"]) - shards["samples"] for shards in self.shards)

    def name(self, dataset: int) -> str:
        """How messages call a dataset."""
        return self.folders[dataset] if self.folders else f"dataset {dataset}"

    def locate(self, draw: Draw) -> IndexRow:
        """Index row of a draw."""
        return self.datasets[draw.dataset].locate(draw.row)


def newest_snapshot(data: DataConfig) -> str:
    """Name of the newest state of the datasets that a data section names (`Mixture.snapshot`). UserError where one
    cannot be read."""
    from grn_scale.data.dataset_info import read_dataset_info

    return ",".join(read_dataset_info(part.dataset).snapshot for part in data.parts)


def dataset_visits(parts: Sequence[MixturePart], samples: Sequence[int], temperature: float) -> list[Visits]:
    """Visits of each part: its repeats, or what its weight makes of as many visits as there are samples in all."""
    if parts[0].weight is None and temperature == 1:
        return [Visits(part.repeats or 1.0, part.repeats or 1.0) for part in parts]
    empty = [part.dataset for part, count in zip(parts, samples) if not count]
    if empty:
        raise ConfigError(f"data.mixture: {', '.join(empty)} has no samples, so no share can be reached; leave it out")
    shares = [part.weight if part.weight is not None else count ** (1 / temperature)
              for part, count in zip(parts, samples)]
    repeats = [round(share / sum(shares) * sum(samples) / count, DIGITS) for share, count in zip(shares, samples)]
    return [Visits(repeat, repeat) for repeat in repeats]


def scale_images(visits: Sequence[Visits], counts: Sequence[tuple[int, int]], share: float | None) -> list[Visits]:
    """Visits scaled so that `share` of them are images (None: as they are), with as many in all.

    counts: images and videos of each dataset. ConfigError where there are no images, or no videos, to reach it.
    """
    if share is None:
        return list(visits)
    images = sum(each.images * count for each, (count, _) in zip(visits, counts))
    videos = sum(each.videos * count for each, (_, count) in zip(visits, counts))
    for name, wanted, found in (("images", share, images), ("videos", 1 - share, videos)):
        if wanted and not found:
            raise ConfigError(f"data.image_share is {share:g}, but there are no {name}: leave data.image_share out "
                              "(null), or add a dataset that has them")
    factors = [wanted * (images + videos) / found if found else 0.0
               for wanted, found in ((share, images), (1 - share, videos))]
    return [Visits(round(each.images * factors[0], DIGITS), round(each.videos * factors[1], DIGITS)) for each in visits]


def _counts(index: Index) -> tuple[int, int]:
    """Images and videos of an index."""
    samples = sum(shard.samples for shard in index.info.video_shards)
    images = sum(shard.images for shard in index.info.video_shards)
    return images, samples - images


def _must_be_same(info: DatasetInfo) -> dict[str, Any]:
    """What the datasets of a mixture must agree in, to be read by one model."""
    return {name: getattr(info, name) for name in
            ("tokenizer_fingerprint", "latent_channels", "rounds", "text_fingerprint", "text_hidden_size", "task_tags")}


def _check_snapshot(folder: str, snapshot: str) -> None:
    from grn_scale.data.dataset_info import SNAPSHOT_DIGITS, snapshots

    if snapshot and snapshot[:SNAPSHOT_DIGITS] not in snapshots(folder):
        raise ConfigError(f"the data state belongs to snapshot {snapshot[:SNAPSHOT_DIGITS]} of the index, which "
                          f"{folder} does not hold (any more): give the folder the run was started with, put its "
                          "index/ back, or start a new run from the weights")

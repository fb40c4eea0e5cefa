"""Shard reading speed: single payloads, packs as training reads them, and against other ways to store samples."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.perf.measure import latent_shape, rates, repeat, spread
from grn_scale.perf.read_formats import compare_formats
from grn_scale.perf.synthetic_dataset import write_synthetic_dataset
from grn_scale.storage import LocalStorage

if TYPE_CHECKING:
    from grn_scale.data.dataset import Dataset


def bench_data(config: Config, samples: int, repeats: int) -> dict[str, Any]:
    """Payload MB a second and samples a second: read one by one (from disk and from memory), by the pack loader, and
    in comparison with one file a sample and with plain sequential reading."""
    with tempfile.TemporaryDirectory(prefix="grn-bench-") as folder:
        from grn_scale.data.block_cache import DiskBlocks
        from grn_scale.data.dataset import Dataset

        path = config.data.dataset or _write_dataset(config, samples, Path(folder))
        dataset = Dataset.open(path, cache=DiskBlocks.of(config.data))
        count = min(samples, dataset.info.samples)
        rows = [dataset.locate(i * dataset.info.samples // count) for i in range(count)]
        size = sum(row.length for row in rows)

        def read() -> None:
            for row in rows:
                dataset.read_bits(row)

        cold = []
        for _ in range(repeats):
            _forget(dataset)
            cold += repeat(read, 1, warmup=0)
        warm = repeat(read, repeats)
        loaded = _load_packs(dataset, config, count, repeats)
    return {
        "samples": count, "payload_bytes": size, "synthetic": not config.data.dataset,
        "cold": {"about": "after asking the system to drop the shards from its cache",
                 "megabytes_per_second": rates(size / 1e6, cold), "samples_per_second": rates(count, cold)},
        "warm": {"about": "shards in the system's cache",
                 "megabytes_per_second": rates(size / 1e6, warm), "samples_per_second": rates(count, warm)},
        "pack_loader": loaded,
        "formats": {"about": "samples of 8 KB and of 1 MB in random order: from a shard, one .npz file each, and the "
                             "shard read front to back; all in the system's cache, in turn",
                    **compare_formats(samples, repeats)},
    }


def _load_packs(dataset: Dataset, config: Config, samples: int, repeats: int) -> dict[str, Any]:
    """The loader of one process: planning, reading, text states; `samples` draws a repeat."""
    from grn_scale.data.loader import PackLoader
    from grn_scale.data.packing import Cost
    from grn_scale.data.plan import Plan

    plan = Plan.of(dataset, config.data, config.seed)
    model = config.model
    cost = Cost.of_shape(model.num_layers, model.hidden_size, model.ffn_hidden_size)
    samples_rates, token_rates = [], []
    with PackLoader(plan, plan.start(), packs_per_step=config.data.packs_per_step, cost=cost,
                    gamma=config.loss.gamma) as loader:
        next(loader)
        for _ in range(repeats):
            begin, seen, tokens = time.perf_counter(), 0, 0
            while seen < samples:
                packs = next(loader).packs
                seen += sum(len(pack.draws) for pack in packs)
                tokens += sum(pack.tokens for pack in packs)
            seconds = time.perf_counter() - begin
            samples_rates.append(seen / seconds)
            token_rates.append(tokens / seconds)
    return {"samples_per_second": spread(samples_rates), "tokens_per_second": spread(token_rates)}


def _write_dataset(config: Config, samples: int, folder: Path) -> Path:
    """Folder of a dataset in the configured shape."""
    model, (thw, ratio_key) = config.model, latent_shape(config.tokenize)
    write_synthetic_dataset(
        folder, samples=samples, thw=thw, ratio_key=ratio_key, latent_channels=model.latent_channels,
        rounds=model.rounds, text_hidden_size=model.text_hidden_size, fps=config.tokenize.fps,
        task_tags=model.task_tags, shard_samples=config.tokenize.shard_samples, seed=config.seed)
    return folder


def _forget(dataset: Dataset) -> None:
    """Ask the system to forget the shards' pages, where it can be asked; written pages must reach the disk first."""
    if not hasattr(os, "posix_fadvise") or not isinstance(dataset.storage, LocalStorage):
        return
    for shard in dataset.info.video_shards:
        with open(dataset.storage.path(shard.name), "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

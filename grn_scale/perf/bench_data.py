"""Shard reading speed: single payloads, and packs as training reads them."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.perf.measure import CAPTION_TOKENS, latent_shape, rates, repeat, spread

if TYPE_CHECKING:
    from grn_scale.data.shards import Dataset

CAPTIONS = 64
"""Text entries of a synthetic dataset."""


def bench_data(config: Config, samples: int, repeats: int) -> dict[str, Any]:
    """Payload MB a second and samples a second, read one by one (from disk and from memory) and by the pack loader."""
    with tempfile.TemporaryDirectory(prefix="grn-bench-") as folder:
        from grn_scale.data.shards import Dataset

        path = config.data.dataset or _write_dataset(config, samples, Path(folder))
        dataset = Dataset.open(path)
        count = min(samples, dataset.info.samples)
        rows = [dataset.locate(i * dataset.info.samples // count) for i in range(count)]
        size = sum(row.length for row in rows)

        def read() -> None:
            for row in rows:
                dataset.read_bits(row)

        def forget() -> None:
            for shard in dataset.info.video_shards:
                _drop_from_page_cache(dataset.folder / shard.name)

        cold = []
        for _ in range(repeats):
            forget()
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
    with PackLoader(dataset, plan, plan.start(), packs_per_step=config.data.packs_per_step, cost=cost,
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
    """Folder of a dataset of random bits in the configured shape, made by the writers of real ones."""
    import numpy as np
    import torch

    from grn_scale.batch import TASKS
    from grn_scale.data import index_parts, schema, shards

    model, thw, ratio_key = config.model, *latent_shape(config.tokenize)
    t, h, w = thw
    drawn = np.random.default_rng(config.seed)
    (folder / "index").mkdir()
    text_rows = []
    with shards.write_shard(folder / "text-000000.tar") as texts:
        for number in range(CAPTIONS):
            tokens = 1 if number == 0 else CAPTION_TOKENS
            states = torch.from_numpy(drawn.standard_normal((tokens, model.text_hidden_size), np.float32))
            text_rows.append(texts.add_text(f"text{number}", range(tokens), states.bfloat16()))
    index_parts.write_text_part(index_parts.part_path(folder, texts.info.name), text_rows)
    video_shards = []
    for first in range(0, samples, config.tokenize.shard_samples):
        rows = []
        with shards.write_shard(folder / f"video-{first // config.tokenize.shard_samples:06d}.tar") as videos:
            for number in range(first, min(samples, first + config.tokenize.shard_samples)):
                payload = videos.add_video(f"clip{number}", drawn.bytes((t * h * w * model.bits_per_token + 7) // 8),
                                           {"shape": thw})
                text = schema.TextRef(f"text{1 + number % (CAPTIONS - 1)}", CAPTION_TOKENS)
                caption = schema.Caption("", dict.fromkeys(TASKS, text))
                rows.append(schema.IndexRow(len(video_shards), number, f"clip{number}", payload.offset, payload.length,
                                            payload.xxh3, thw, ratio_key, (caption,)))
        index_parts.write_video_part(index_parts.part_path(folder, videos.info.name), rows)
        video_shards.append(videos.info)
    names = [shard.name for shard in (*video_shards, texts.info)]
    shards.write_dataset_info(folder, schema.DatasetInfo(
        schema.FORMAT_VERSION, "synthetic", model.latent_channels, model.rounds, "synthetic", model.text_hidden_size,
        model.task_tags, schema.TextRef("text0", 1), config.tokenize.fps, samples, samples * t * h * w,
        tuple(video_shards), (texts.info,), index_parts.snapshot_of(folder, names)))
    return folder


def _drop_from_page_cache(path: Path) -> None:
    """Ask the system to forget the file's pages, where it can be asked; written pages must reach the disk first."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

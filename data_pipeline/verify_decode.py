"""`grn-scale verify --decode`: samples turned back into frames, and compared with the clips they were made from."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from grn_scale.config.schema import Config
from grn_scale.data.dataset import Dataset
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip
from grn_scale.data.manifest import Clip, ManifestError, numbered_lines, parse_line
from grn_scale.data.schema import IndexRow
from grn_scale.data.shard_writer import BLOCK
from grn_scale.data_pipeline.chunks import VideoSettings, find_sources
from grn_scale.errors import UserError
from grn_scale.evaluation.quality import compare, decode_bits
from grn_scale.hbq import to_channel_major, unpack_bits
from grn_scale.tokenizer import load_tokenizer

LEAST_SSIM_SIDE = 11
"""Pixels of the window."""


def decode_samples(dataset: Dataset, config: Config, count: int, manifest: str | None) -> list[dict[str, Any]]:
    """For `count` samples spread over the dataset, as plain values: the entropy of each round's bits (1: both values
    are equally frequent), and with a manifest PSNR in dB, and SSIM where scikit-image is installed, against the clip.

    Of the manifest only lines with the samples' ids are followed to their files, until all are found. Raises UserError
    where the tokenizer is another one than the dataset's, or the manifest does not hold a sample's clip.
    """
    info = dataset.info
    tokenizer = load_tokenizer(config.tokenizer.path)
    dataset.check_tokenizer(tokenizer.fingerprint)
    tokenizer = tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    count = min(count, info.samples)
    rows = [dataset.locate(number * info.samples // count) for number in range(count)]
    ids = {row.key: str(_about(dataset, row).get("id", "")) for row in rows}
    clips = _find_clips(manifest, ids, dataset, config) if manifest else {}
    samples = []
    for row in rows:
        bits = unpack_bits(dataset.read_bits(row), (*row.thw, info.latent_channels * info.rounds))
        sample: dict[str, Any] = {"key": row.key, "id": ids[row.key], "latent_shape": list(row.thw),
                                  "ratio_key": row.ratio_key,
                                  "bit_entropy_by_round": _entropies(bits.numpy(), info.rounds)}
        pieces = decode_bits(tokenizer, to_channel_major(bits)[None], info.rounds)
        if manifest:
            sample |= _compared(pieces, clips[row.key], dataset, config)
        else:
            sample["frames"] = sum(len(piece) for piece in pieces)
        samples.append(sample)
    return samples


def mean_by_bucket(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the samples of each latent shape, and over all of them at the end (latent_shape None)."""
    shapes = sorted({tuple(sample["latent_shape"]) for sample in samples})
    groups = [(list(shape), [s for s in samples if tuple(s["latent_shape"]) == shape]) for shape in shapes]
    means = []
    for shape, group in (*groups, (None, samples)):
        rounds = zip(*(sample["bit_entropy_by_round"] for sample in group))
        mean: dict[str, Any] = {"latent_shape": shape, "samples": len(group),
                                "bit_entropy_by_round": [round(fmean(values), 4) for values in rounds]}
        for name in ("psnr_db", "ssim"):
            values = [sample[name] for sample in group if name in sample]
            if values:
                mean[name] = round(fmean(values), 4)
        means.append(mean)
    return means


def _compared(pieces: Iterator[np.ndarray], clip: Clip, dataset: Dataset, config: Config) -> dict[str, Any]:
    first = next(pieces)
    height, width = first.shape[1:3]
    request = DecodeRequest(str(clip.path), dataset.info.fps, config.tokenize.max_frames, clip.begin_frame,
                            clip.end_frame, height=height, width=width, flip=clip.flip, member=clip.member)
    try:
        truth = decode_clip(request).frames
    except DecodeError as error:
        raise UserError(f"{request.media} was tokenized, but cannot be decoded here: {error.detail}") from error
    ssim = importlib.util.find_spec("skimage") is not None and min(height, width) >= LEAST_SSIM_SIDE
    found = compare(_chained(first, pieces), truth, ssim=ssim)
    values = {"frames": len(truth), "psnr_db": round(found.psnr_db, 3)}
    return values | ({"ssim": round(found.ssim, 4)} if found.ssim is not None else {})


def _chained(first: np.ndarray, rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    yield from rest


def _about(dataset: Dataset, row: IndexRow) -> dict[str, Any]:
    """The JSON member of a sample, which follows its bits in the tar."""
    name = dataset.info.video_shards[row.shard].name
    header = row.offset + row.length + -row.length % BLOCK
    size = int(dataset.storage.read_range(name, header, BLOCK)[124:136].rstrip(b"\0"), 8)
    return json.loads(dataset.storage.read_range(name, header + BLOCK, size))


def _find_clips(manifest: str, ids: dict[str, str], dataset: Dataset, config: Config) -> dict[str, Clip]:
    """Key -> clip, given key -> id. Reads the manifest as far as it has to, and no media file of another id."""
    info = dataset.info
    settings = VideoSettings(info.tokenizer_fingerprint, info.latent_channels, info.rounds, info.fps,
                             config.tokenize.max_frames, config.tokenize.latent_side)
    wanted, found = set(ids.values()), {}
    for file, number, raw in numbered_lines(Path(manifest)):
        try:
            clip = parse_line(raw, file, number, allow_empty_captions=True)
        except ManifestError:
            continue  # such a line gives no sample
        if clip.id in wanted:
            ((source,), _) = find_sources([clip], settings, {})
            if source.key in ids:
                found.setdefault(source.key, clip)
                if len(found) == len(ids):
                    return found
    missing = next(key for key in ids if key not in found)
    raise UserError(f"no line of {manifest} is sample {missing} (id {ids[missing]!r}); give the manifest and the "
                    "configuration that the dataset was tokenized with")


def _entropies(bits: np.ndarray, rounds: int) -> list[float]:
    """Mean entropy of a bit in each round, over channels, in bits: 1 where both values are equally frequent."""
    share = bits.reshape(-1, rounds, bits.shape[-1] // rounds).mean(axis=0).clip(1e-12, 1 - 1e-12)
    entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    return [round(float(value), 4) for value in entropy.mean(axis=1)]

"""Frechet distance and Inception Score of samples, by the features and class scores of a network the user names."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from grn_scale.data.decode import DecodeError
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation import generation, network, preprocessing
from grn_scale.evaluation.clips import ClipSet
from grn_scale.evaluation.frechet import Gaussian, Moments, frechet_distance
from grn_scale.evaluation.inception_score import InceptionScore
from grn_scale.evaluation.job import Job, Shares, shared, together
from grn_scale.evaluation.network import FeatureNetwork, load_network
from grn_scale.evaluation.preprocessing import Preprocessing
from grn_scale.evaluation.progress import shown
from grn_scale.evaluation.statistics_file import read_statistics, write_statistics

log = logging.getLogger(__name__)

FILES_PER_JOB = 8
UNCOMPARED = ("network", "weights", "score_arguments", "score_form")
"""Settings that may differ between statistics and samples."""
NAMED = 10
"""Files that the log names one by one."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison by features."""
    network.add_options(parser)
    parser.add_argument("--samples", metavar="FOLDER", help="samples to judge: videos and pictures, as they are, or "
                        "what `grn-scale sample` wrote (default: those of --generate)")
    parser.add_argument("--real", metavar="FOLDER|MANIFEST", help="what they are compared with: files as they are, or "
                        "the clips of a manifest, decoded as `tokenize` decodes them")
    parser.add_argument("--statistics", metavar="FILE.npz",
                        help="or stored mean and covariance: mu and sigma, or mean and cov")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="write mean and covariance of --real, or without "
                        "it of the samples")
    parser.add_argument("--splits", type=int, default=10, metavar="N",
                        help="parts the Inception Score is averaged over (default: 10)")
    parser.add_argument("--batch", type=int, default=16, metavar="N",
                        help="pictures or clips that go through the network at once (default: 16)")
    preprocessing.add_options(parser)


@dataclass(frozen=True)
class Measured:
    """What the network made of a set of clips."""

    gaussian: Gaussian | None
    """Only on rank 0, as are the scores."""
    inception_score: dict[str, Any] | None
    """None also where the network gives no class scores."""
    about: dict[str, Any]


def check(options: argparse.Namespace) -> None:
    """ConfigError where the options do not go together."""
    samples = options.samples or options.generate
    if options.samples and options.generate:
        raise ConfigError("--samples and --generate are given: judge a folder, or samples that are drawn now")
    if options.real and options.statistics:
        raise ConfigError("--real and --statistics are given: compare with one of them")
    if not samples and not (options.real and options.save_statistics):
        raise ConfigError("--features needs samples to judge (--samples FOLDER, or --generate), or clips to store "
                          "statistics of (--real with --save-statistics)")
    if options.statistics and not samples:
        raise ConfigError("--statistics is given, but no samples to compare with it: give --samples or --generate")
    for name in ("splits", "batch"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} is {getattr(options, name)}, but must be at least 1")


def measure(job: Job) -> dict[str, Any]:
    """Frechet distance, Inception Score and what they rest on; complete on rank 0."""
    options, ranks = job.options, job.ranks
    net, prepare, reference = together(ranks, lambda: _open(options))
    settings = {**net.settings, **prepare.settings()}
    result: dict[str, Any] = {"settings": settings}
    samples = job.folder / generation.FOLDER if options.generate else options.samples
    width = None if reference is None else reference.width
    other, judged = reference, None
    if options.real:
        real = _measure_set(job, options.real, net, prepare, width, scored=False)
        result["real"], other = real.about, real.gaussian
    if samples:
        judged = _measure_set(job, samples, net, prepare, width, scored=True)
        result |= {"samples": judged.about, "inception_score": judged.inception_score}
    ranks.first(lambda: result.update(_compare(options, judged and judged.gaussian, other, settings)))
    return result


def _open(options: argparse.Namespace) -> tuple[FeatureNetwork, Preprocessing, Gaussian | None]:
    """The network, what goes before it, and the stored statistics, which must have been made with both."""
    net = load_network(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prepare = preprocessing.of_options(options, net.preprocessing)
    if not options.statistics:
        return net, prepare, None
    gaussian, made_with = read_statistics(options.statistics)
    _check_origin(options.statistics, made_with, {**net.settings, **prepare.settings()})
    return net, prepare, gaussian


def _compare(options: argparse.Namespace, judged: Gaussian | None, other: Gaussian | None,
             settings: dict[str, Any]) -> dict[str, Any]:
    """The distance, where there are two sets, and where statistics were written."""
    result: dict[str, Any] = {}
    if judged and other:
        result = {"frechet_distance": frechet_distance(judged, other), "reference": options.statistics or options.real,
                  "reference_samples": other.count}
    if options.save_statistics:
        kept = judged if options.real is None else other
        write_statistics(options.save_statistics, kept, settings)
        result["saved_statistics"] = options.save_statistics
    return result


def _check_origin(file: str, made_with: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """UserError where the statistics say that another network or preprocessing made them."""
    if made_with is None:
        log.warning("%s does not say which network and preprocessing made it: whether they are these is unknown", file)
        return
    # Names of files tell less than the fingerprint, and how class scores are had does not touch the features.
    changed = [f"{name} {made_with.get(name)} there, {settings.get(name)} here"
               for name in sorted(made_with.keys() | settings.keys())
               if name not in UNCOMPARED and made_with.get(name) != settings.get(name)]
    if changed:
        raise UserError(f"--statistics: {file} was made in another way ({'; '.join(changed)}); distances between them "
                        "mean nothing: use the same options, or make the statistics anew")


def _measure_set(job: Job, place: str | Path, net: FeatureNetwork, prepare: Preprocessing, width: int | None, *,
                 scored: bool) -> Measured:
    """Features (and where `scored` class scores) of all clips of a folder or manifest.

    width: features that the reference has; others are refused with the first batch.
    """
    clips = together(job.ranks, lambda: ClipSet.open(place, job.config.tokenize))
    jobs = [clips.clips[i:i + FILES_PER_JOB] for i in range(0, len(clips.clips), FILES_PER_JOB)]
    gathered: list[Any] = []
    with shared(job) as shares:
        extraction = Extraction(shares, clips, net, prepare, width, job.options.batch)
        rows = sorted(shares.run(lambda: list(extraction(jobs))), key=lambda row: row["number"])
        bad = [{"id": row["id"], "reason": row["reason"], "detail": row["detail"]} for row in rows if "reason" in row]
        parts = [row for row in rows if "reason" not in row]
        count = sum(row["samples"] for row in parts)
        if not count:
            raise UserError(f"none of the {len(clips.clips)} files of {clips.name} gives a sample; the first said: "
                            f"{bad[0]['detail']}")
        job.ranks.first(lambda: gathered.extend(_gather(shares, parts, job.options.splits if scored else None)))
    if job.ranks.rank == 0:
        for row in bad[:NAMED]:
            log.warning("%s is left out: %s", row["id"], row["detail"])
        if len(bad) > NAMED:
            log.warning("and %d more files of %s; the result names them", len(bad) - NAMED, clips.name)
    gaussian, score = gathered or (None, None)
    about = {"from": clips.name, "files": len(clips.clips), "unusable_files": len(bad), "unusable": bad,
             "samples": count}
    if gaussian is not None:
        about["fewer_samples_than_features"] = count <= gaussian.width
        if count <= gaussian.width:
            log.warning("%s gives %d samples for %d features: its covariance is singular and the distance too large; "
                        "compare only distances of equally many samples, or take more", clips.name, count,
                        gaussian.width)
    return Measured(gaussian, score, about)


@dataclass(frozen=True, eq=False)
class Extraction:
    """Turns jobs of a few clips into files of features: what is in a file does not depend on who wrote it."""

    shares: Shares
    clips: ClipSet
    network: FeatureNetwork
    prepare: Preprocessing
    width: int | None
    batch: int

    def __call__(self, jobs: Sequence[Sequence[Any]]) -> Iterator[dict[str, Any]]:
        """A row for each file that was written, and for each clip that gives no sample."""
        ranks = self.shares.ranks
        numbered = [(number, clip) for number in range(ranks.rank, len(jobs), ranks.size) for clip in jobs[number]]
        taken = (clip for _, members in self.shares.mine(jobs) for clip in members)
        pending: list[np.ndarray] = []
        outcomes = zip(numbered, self.clips.decode(taken))
        for i, ((number, _), (name, frames)) in enumerate(shown(outcomes, len(numbered), f"features of "
                                                                f"{self.clips.name}", ranks.rank == 0)):
            samples = None if isinstance(frames, DecodeError) else self.prepare.pick(frames)
            if samples is not None:
                pending.append(samples)
            elif isinstance(frames, DecodeError):
                yield {"number": number, "id": name, "reason": frames.reason, "detail": frames.detail}
            else:
                yield {"number": number, "id": name, "reason": "too_short", "detail":
                       f"{name} has {len(frames)} frames, fewer than --clip-frames {self.prepare.clip_frames}"}
            if pending and (i + 1 == len(numbered) or numbered[i + 1][0] != number):
                yield self._store(number, pending)
                pending = []

    def _store(self, number: int, clips: Sequence[np.ndarray]) -> dict[str, Any]:
        found = [self.network(self.prepare(samples, self.network.device)) for samples in self._batches(clips)]
        features = torch.cat([features for features, _ in found])
        if self.width is not None and features.shape[1] != self.width:
            raise UserError(f"--statistics are of {self.width} features, but the network gives {features.shape[1]}: "
                            "use the network that they were made with")
        tensors = {"features": features}
        if found[0][1] is not None:
            tensors["probabilities"] = torch.cat([probabilities for _, probabilities in found])
        save_file(tensors, self.shares.folder / f"{number:08d}.safetensors")
        return {"number": number, "samples": len(features)}

    def _batches(self, clips: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """At most `batch` samples of one shape at a time, in order."""
        for _, alike in itertools.groupby(clips, key=lambda samples: samples.shape[1:]):
            samples = np.concatenate(list(alike))
            yield from (samples[i:i + self.batch] for i in range(0, len(samples), self.batch))


def _gather(shares: Shares, parts: Sequence[dict[str, Any]], splits: int | None,
            ) -> tuple[Gaussian, dict[str, Any] | None]:
    """Mean and covariance, and with `splits` the Inception Score, of all parts in the order of their numbers."""
    moments, score = Moments(), None
    for i, part in enumerate(parts):
        tensors = load_file(shares.folder / f"{part['number']:08d}.safetensors")
        moments.add(tensors["features"])
        if splits is not None and "probabilities" in tensors:
            if i == 0:
                score = InceptionScore(sum(row["samples"] for row in parts), splits)
            score.add(tensors["probabilities"])
    return moments.gaussian(), score and score.result()


def table(result: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"network      {result['settings']['network']}, {result['settings']['input']}"]
    for name in ("real", "samples"):
        if about := result.get(name):
            lines.append(f"{name:<13}{about['samples']} samples of {about['files']} files in {about['from']}, "
                         f"{about['unusable_files']} files left out"
                         + (", FEWER THAN FEATURES" if about["fewer_samples_than_features"] else ""))
    if "frechet_distance" in result:
        lines.append(f"distance     {result['frechet_distance']:.4f} (Frechet) to {result['reference']}")
    if score := result.get("inception_score"):
        lines.append(f"score        {score['mean']:.4f} +- {score['standard_deviation']:.4f} (Inception Score, "
                     f"{score['splits']} splits)")
    if "saved_statistics" in result:
        lines.append(f"statistics   {result['saved_statistics']}")
    return lines

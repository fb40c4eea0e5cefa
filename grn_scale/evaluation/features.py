"""Frechet distance and Inception Score of samples, by the features and class scores of a network the user names."""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import os
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
UNCOMPARED = ("network", "weights", "score_arguments", "score_form", "data")
"""Settings that may differ between statistics and samples; of "data" a warning tells."""
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


@dataclass(frozen=True, eq=False)
class Instrument:
    """What samples are measured with."""

    network: FeatureNetwork
    prepare: Preprocessing
    reference: Gaussian | None
    """Of --statistics."""
    reference_data: dict[str, Any]
    """Frame rate and size of the clips behind it, where its file says so."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the features depend on."""
        return {**self.network.settings, **self.prepare.settings()}


@dataclass(frozen=True)
class Measured:
    """What the network made of a set of clips."""

    gaussian: Gaussian | None
    """Only on rank 0, as are the scores."""
    inception_score: dict[str, Any] | None
    """None also where the network gives no class scores."""
    about: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        """What the clips were, before any preprocessing."""
        return {name: self.about[name] for name in ("fps", "frame_size")}


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


def prepared(job: Job) -> Instrument:
    """The network, what goes before it, and the stored statistics, which must have been made with both.

    For before anything is measured: samples that took hours must not be drawn for a file that cannot be read or
    written. UserError or ConfigError where one is not as it should be, on all processes.
    """
    instrument = together(job.ranks, lambda: _open(job.options))
    if job.options.save_statistics:
        job.ranks.first(lambda: _make_place(Path(job.options.save_statistics)))
    return instrument


def measure(job: Job, instrument: Instrument) -> dict[str, Any]:
    """Frechet distance, Inception Score and what they rest on; complete on rank 0."""
    options = job.options
    result: dict[str, Any] = {"settings": instrument.settings}
    samples = job.folder / generation.FOLDER if options.generate else options.samples
    real, judged = None, None
    if options.real:
        real = _measure_set(job, options.real, instrument, scored=False)
        result["real"] = real.about
    if samples:
        judged = _measure_set(job, samples, instrument, scored=True)
        result |= {"samples": judged.about, "inception_score": judged.inception_score}
    job.ranks.first(lambda: result.update(_compare(options, judged, real, instrument)))
    return result


def _open(options: argparse.Namespace) -> Instrument:
    net = load_network(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prepare = preprocessing.of_options(options, net.preprocessing)
    if not options.statistics:
        return Instrument(net, prepare, None, {})
    gaussian, made_with = read_statistics(options.statistics)
    data = (made_with or {}).get("data")
    instrument = Instrument(net, prepare, gaussian, data if isinstance(data, dict) else {})
    _check_origin(options.statistics, made_with, instrument.settings)
    return instrument


def _make_place(file: Path) -> None:
    """Make the folder of --save-statistics where it is missing. UserError where the file could not be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save-statistics: cannot make {file.parent}: {error.strerror}") from error
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"--save-statistics: {file} is a folder or lies in one that cannot be written to; give a file "
                        "in another")


def _compare(options: argparse.Namespace, judged: Measured | None, real: Measured | None,
             instrument: Instrument) -> dict[str, Any]:
    """The distance, where there are two sets, and where statistics were written."""
    result: dict[str, Any] = {}
    other = instrument.reference if real is None else real.gaussian
    if judged and other:
        result = {"frechet_distance": frechet_distance(judged.gaussian, other),
                  "reference": options.statistics or options.real, "reference_samples": other.count}
        _compare_data(judged.data, instrument.reference_data if real is None else real.data, instrument.prepare.input)
    if options.save_statistics:
        kept = real or judged
        write_statistics(options.save_statistics, kept.gaussian, {**instrument.settings, "data": kept.data})
        result["saved_statistics"] = options.save_statistics
    return result


def _compare_data(samples: dict[str, Any], reference: dict[str, Any], form: str) -> None:
    """Warn where frames of another size, or clips of another rate, are compared."""
    told = []
    if None not in (fps := [data.get("fps") for data in (samples, reference)]) and form == "clips":
        if not math.isclose(*fps, rel_tol=1e-3):
            told.append(f"{fps[0]:g} frames a second against {fps[1]:g}")
    if None not in (size := [data.get("frame_size") for data in (samples, reference)]) and size[0] != size[1]:
        told.append(f"frames of {size[0]} pixels against {size[1]}")
    if told:
        log.warning("the samples are not of the form of what they are compared with (%s): the distance measures this "
                    "too", "; ".join(told))


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


def _measure_set(job: Job, place: str | Path, instrument: Instrument, *, scored: bool) -> Measured:
    """Features (and where `scored` class scores) of all clips of a folder or manifest."""
    clips = together(job.ranks, lambda: ClipSet.open(place, job.config.tokenize))
    jobs = [clips.clips[i:i + FILES_PER_JOB] for i in range(0, len(clips.clips), FILES_PER_JOB)]
    gathered: list[Any] = []
    with shared(job) as shares:
        extraction = Extraction(shares, clips, instrument, job.options.batch)
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
             "samples": count, "fps": clips.fps, "frame_size": _one([size for row in parts for size in row["sizes"]])}
    if gaussian is not None:
        about["fewer_samples_than_features"] = count <= gaussian.width
        if count <= gaussian.width:
            log.warning("%s gives %d samples for %d features: its covariance is singular and the distance too large; "
                        "compare only distances of equally many samples, or take more", clips.name, count,
                        gaussian.width)
    return Measured(gaussian, score, about)


def _one(sizes: Sequence[str]) -> str:
    return sizes[0] if len(set(sizes)) == 1 else "several sizes"


@dataclass(frozen=True, eq=False)
class Extraction:
    """Turns jobs of a few clips into files of features: what is in a file does not depend on who wrote it."""

    shares: Shares
    clips: ClipSet
    instrument: Instrument
    batch: int

    def __call__(self, jobs: Sequence[Sequence[Any]]) -> Iterator[dict[str, Any]]:
        """A row for each file that was written, and for each clip that gives no sample."""
        ranks = self.shares.ranks
        numbered = [(number, clip) for number in range(ranks.rank, len(jobs), ranks.size) for clip in jobs[number]]
        taken = (clip for _, members in self.shares.mine(jobs) for clip in members)
        prepare, pending = self.instrument.prepare, []
        outcomes = zip(numbered, self.clips.decode(taken, prepare.most_frames))
        for i, ((number, _), (name, frames)) in enumerate(shown(outcomes, len(numbered), f"features of "
                                                                f"{self.clips.name}", ranks.rank == 0)):
            samples = None if isinstance(frames, DecodeError) else prepare.pick(frames)
            if samples is not None:
                pending.append(samples)
            elif isinstance(frames, DecodeError):
                yield {"number": number, "id": name, "reason": frames.reason, "detail": frames.detail}
            else:
                yield {"number": number, "id": name, "reason": "too_short", "detail":
                       f"{name} has {len(frames)} frames, fewer than --clip-frames {prepare.clip_frames}"}
            if pending and (i + 1 == len(numbered) or numbered[i + 1][0] != number):
                yield self._store(number, pending)
                pending = []

    def _store(self, number: int, clips: Sequence[np.ndarray]) -> dict[str, Any]:
        """Write features and class scores of the samples [n, ..., H, W, 3]; features of another width than the
        reference has are refused."""
        network, reference = self.instrument.network, self.instrument.reference
        found = [network(self.instrument.prepare(samples, network.device)) for samples in self._batches(clips)]
        features = torch.cat([features for features, _ in found])
        if reference is not None and features.shape[1] != reference.width:
            raise UserError(f"--statistics are of {reference.width} features, but the network gives "
                            f"{features.shape[1]}: use the network that they were made with")
        tensors = {"features": features}
        if found[0][1] is not None:
            tensors["probabilities"] = torch.cat([probabilities for _, probabilities in found])
        save_file(tensors, self.shares.folder / f"{number:08d}.safetensors")
        sizes = sorted({"{}x{}".format(*samples.shape[-3:-1]) for samples in clips})
        return {"number": number, "samples": len(features), "sizes": sizes}

    def _batches(self, clips: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """At most `batch` samples of one shape at a time, in order."""
        for _, alike in itertools.groupby(clips, key=lambda samples: samples.shape[1:]):
            samples = np.concatenate(list(alike))
            yield from (samples[i:i + self.batch] for i in range(0, len(samples), self.batch))


def _gather(shares: Shares, parts: Sequence[dict[str, Any]], splits: int | None,
            ) -> tuple[Gaussian, dict[str, Any] | None]:
    """Mean and covariance, and with `splits` the Inception Score, of all parts in the order of their numbers."""
    moments, score, count = Moments(), None, sum(row["samples"] for row in parts)
    for i, part in enumerate(parts):
        tensors = load_file(shares.folder / f"{part['number']:08d}.safetensors")
        moments.add(tensors["features"])
        if splits is None or "probabilities" not in tensors:
            continue
        if i == 0 and count < splits:
            log.warning("%d samples cannot be cut into %d splits: there is no Inception Score; give --splits %d or "
                        "fewer, or more samples", count, splits, count)
        elif i == 0:
            score = InceptionScore(count, splits)
        if score is not None:
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

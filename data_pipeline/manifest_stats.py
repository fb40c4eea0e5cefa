"""grn-scale manifest stats: what a manifest holds, and what tokenize would make of it, bucket by bucket.

    grn-scale manifest stats clips.jsonl
    grn-scale manifest stats clips.jsonl tokenize.latent_side=40 tokenize.fps=16 --probe --plot clips.png
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grn_scale.command_line import CommandParser
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.buckets import RATIO_KEYS, bucket
from grn_scale.data.decode import DecodeError, Media, VideoInfo
from grn_scale.data.decode_pool import DecodePool
from grn_scale.data.manifest import Clip, ManifestError, numbered_lines, parse_line
from grn_scale.data_pipeline.manifest_checks import counting
from grn_scale.data_pipeline.manifest_plan import Facts, place, probed_facts, told_facts
from grn_scale.data_pipeline.manifest_show import plot, print_tables
from grn_scale.data_pipeline.manifest_spread import Spread
from grn_scale.errors import ConfigError, UserError

TOP_SIZES = 20
OTHER_TOKENS = 2
"""Least tokens a sample takes in a pack beside its visual ones: one of text, one of the noise level."""


@dataclass
class BucketCount:
    """Clips of one aspect ratio template."""

    clips: int = 0
    """All that fall into it, dropped ones too."""
    crop: Spread = field(default_factory=Spread)
    enlarged: Spread = field(default_factory=Spread)
    """Factors above 1 alone."""
    tokens: Spread = field(default_factory=Spread)
    """Visual tokens of the clips that are kept and whose length is known."""
    too_short: int = 0
    cut: int = 0
    """Clips longer than max_frames, of which the rest is left out."""
    cut_seconds: float = 0.0
    over_budget: int = 0
    """Kept clips that do not fit into data.token_budget, so that training would refuse the dataset."""

    @property
    def usable(self) -> int:
        return self.clips - self.too_short - self.over_budget


class Survey:
    """Counts over the clips of a manifest."""

    def __init__(self, settings: TokenizeConfig, token_budget: int):
        self.settings, self.token_budget = settings, token_budget
        self.clips = self.flipped = self.with_class = self.without_caption = self.images = 0
        self.unknown_size = self.unknown_length = 0
        self.seconds, self.megapixels, self.words = Spread(), Spread(), Spread()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.captions: Counter[str] = Counter()
        self.buckets = {key: BucketCount() for key in RATIO_KEYS}
        self.dropped: Counter[str] = Counter()

    def add(self, clip: Clip, facts: Facts | None, reason: str = "") -> None:
        """Count a clip; without facts it is dropped for `reason`."""
        self.clips += 1
        self.flipped += clip.flip
        self.with_class += clip.class_id is not None
        self.without_caption += not clip.captions and clip.class_id is None
        for kind, text in clip.captions:
            self.captions[kind or "untyped"] += 1
            self.words.add(len(text.split()))
        if facts is None:
            self.dropped[reason] += 1
            return
        self.images += facts.fps == 0
        self.unknown_length += not facts.frames
        if facts.seconds is not None:
            self.seconds.add(facts.seconds)
        self._place(facts)

    def _place(self, facts: Facts) -> None:
        placement = place(facts, self.settings)
        if placement is None:
            self.unknown_size += 1
            return
        height, width = facts.size
        self.sizes[width, height] += 1
        self.megapixels.add(width * height / 1e6)
        count = self.buckets[placement.bucket.ratio_key]
        count.clips += 1
        count.crop.add(placement.crop)
        if placement.enlarged > 1:
            count.enlarged.add(placement.enlarged)
        if placement.too_short:
            count.too_short += 1
            self.dropped["too_short"] += 1
            return
        if placement.cut_seconds:
            count.cut += 1
            count.cut_seconds += placement.cut_seconds
        if placement.tokens is not None:
            count.tokens.add(placement.tokens)
            count.over_budget += placement.tokens + OTHER_TOKENS > self.token_budget

    @property
    def usable(self) -> int:
        """Clips that nothing known speaks against."""
        return self.clips - self.dropped.total() - sum(count.over_budget for count in self.buckets.values())

    def result(self) -> dict[str, Any]:
        """All counts as JSON values."""
        settings = self.settings
        return {
            "clips": self.clips, "usable": self.usable, "images": self.images, "flipped": self.flipped,
            "with_class_id": self.with_class, "without_caption": self.without_caption,
            "unknown_size": self.unknown_size, "unknown_length": self.unknown_length,
            "seconds": self.seconds.summary(), "megapixels": self.megapixels.summary(),
            "sizes": {f"{width}x{height}": count for (width, height), count in self.sizes.most_common(TOP_SIZES)},
            "other_sizes": self.sizes.total() - sum(count for _, count in self.sizes.most_common(TOP_SIZES)),
            "captions": dict(self.captions.most_common()), "caption_words": self.words.summary(),
            "settings": {"latent_side": settings.latent_side, "fps": settings.fps, "max_frames": settings.max_frames,
                         "token_budget": self.token_budget},
            "buckets": [self._bucket(key, count) for key, count in self.buckets.items() if count.clips],
            "dropped": dict(self.dropped.most_common())}

    def _bucket(self, key: float, count: BucketCount) -> dict[str, Any]:
        size = bucket(key, self.settings.latent_side)
        return {"ratio_key": key, "height": size.height, "width": size.width, "clips": count.clips,
                "crop_mean": round(count.crop.sum / count.clips, 4), "crop_max": round(count.crop.max, 4),
                "enlarged": count.enlarged.counts.total(), "enlarged_by": count.enlarged.summary(),
                "tokens": count.tokens.summary(), "cut": count.cut, "cut_seconds": round(count.cut_seconds, 1),
                "too_short": count.too_short, "over_budget": count.over_budget}


def survey(path: str | Path, settings: TokenizeConfig, token_budget: int, *, probe: bool = False) -> Survey:
    """Counts over a manifest: from its fields alone, or with `probe` from the headers of the media files.

    Lines that cannot be read are dropped with their reason. Raises ManifestError where the file cannot be read.
    """
    found = Survey(settings, token_budget)

    def good(lines: Iterable[tuple[Path, int, bytes]]) -> Iterator[Clip]:
        for file, number, raw in lines:
            try:
                yield parse_line(raw, file, number, allow_empty_captions=settings.allow_empty_captions)
            except ManifestError as error:
                found.clips += 1
                found.dropped[error.reason] += 1

    with counting("probe" if probe else "read", numbered_lines(path)) as lines:
        if not probe:
            for clip in good(lines):
                found.add(clip, told_facts(clip, settings.fps))
            return found
        for clip, info in _probed(good(lines), settings):
            if isinstance(info, DecodeError):
                found.add(clip, None, info.reason)
            else:
                found.add(clip, probed_facts(clip, info), "out_of_range")
    return found


def _probed(clips: Iterable[Clip], settings: TokenizeConfig) -> Iterator[tuple[Clip, VideoInfo | DecodeError]]:
    """The clips with what their files' headers say, read in child processes; once for clips of one file in a row."""
    groups = ((media, list(group)) for media, group in itertools.groupby(
        clips, key=lambda clip: Media(str(clip.path), clip.member)))
    asked, walked = itertools.tee(groups)
    with DecodePool.of(settings) as pool:
        for (_, group), (_, info) in zip(walked, pool.probe(media for media, _ in asked)):
            for clip in group:
                yield clip, info


def main(argv: list[str]) -> int:
    """Exit code: 0, or 1 where no clip is left to train on. The result goes to stdout."""
    parser = CommandParser("manifest stats", "Count what the manifest FILE (the first argument, or data.manifest) "
                           "holds, and what tokenize would make of it.",
                           "grn-scale manifest stats clips.jsonl tokenize.latent_side=40 --probe --plot clips.png",
                           json=True, schema=SCHEMAS)
    parser.add_argument("--probe", action="store_true", help="read sizes and lengths from the media files' headers")
    parser.add_argument("--plot", metavar="PNG", help="picture to write: lengths, sizes, aspect ratios, captions")
    named = bool(argv) and not argv[0].startswith("-") and "=" not in argv[0]
    config, options = parser.parse_command(argv[1:] if named else argv)
    manifest = argv[0] if named else config.data.manifest
    if not manifest:
        raise ConfigError(f"no manifest: {parser.prog} FILE, or data.manifest=FILE")
    if options.plot and not Path(options.plot).absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {Path(options.plot).absolute().parent}; make it first")
    found = survey(manifest, config.tokenize, config.data.token_budget, probe=options.probe)
    if options.plot:
        plot(found, Path(options.plot))
    print(json.dumps(found.result(), indent=1)) if options.json else print_tables(found.result())
    if not found.usable:
        raise UserError(f"{manifest}: none of its {found.clips} lines gives a clip to train on with these settings; "
                        "the counts of dropped clips say why (`grn-scale manifest validate` names the lines): mend the "
                        "manifest, or change tokenize.fps, tokenize.max_frames, tokenize.latent_side or "
                        "data.token_budget")
    return 0

"""What tokenize would make of a clip, from its size and length alone: its bucket, its tokens, what is cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.buckets import Bucket, choose_bucket, latent_frames, whole_groups
from grn_scale.data.manifest import Clip
from grn_scale.data.media_file import Media
from grn_scale.data.video_index import IMAGE_SUFFIXES, VideoInfo


@dataclass(frozen=True)
class Facts:
    """What is known of a clip's source; None for what is not."""

    size: tuple[int, int] | None
    """Height and width in pixels, as displayed."""
    frames: float | None
    """Source frames of the clip; 1 for an image."""
    fps: float | None
    """Source frames a second; 0 for an image."""

    @property
    def seconds(self) -> float | None:
        """Length of the clip; None for an image and where it is not known."""
        return self.frames / self.fps if self.frames and self.fps else None


def is_image(clip: Clip) -> bool:
    return Media(str(clip.path), clip.member).suffix in IMAGE_SUFFIXES


def told_facts(clip: Clip, fps: float) -> Facts:
    """What the manifest line says. `fps` stands for a source rate that it does not say."""
    size = (clip.height, clip.width) if clip.height and clip.width else None
    if is_image(clip):
        return Facts(size, 1, 0)
    rate = clip.fps or (fps if clip.duration else None)
    if clip.end_frame is not None:
        return Facts(size, clip.end_frame - (clip.begin_frame or 0), rate)
    return Facts(size, round(clip.duration * rate) if clip.duration else None, rate)


def probed_facts(clip: Clip, info: VideoInfo) -> Facts | None:
    """What the file says; None where the clip's range lies outside it."""
    begin, end = clip.begin_frame or 0, info.frames if clip.end_frame is None else clip.end_frame
    if not 0 <= begin < end <= info.frames:
        return None
    return Facts((info.height, info.width), end - begin, info.fps)


@dataclass(frozen=True)
class Placement:
    """A clip in its bucket."""

    bucket: Bucket
    crop: float
    """Share of the source's picture that is cut off."""
    enlarged: float
    """How many times larger the picture becomes; below 1 it becomes smaller."""
    tokens: int | None
    """Visual tokens; None where the length is not known."""
    cut_seconds: float
    """What the clip is longer than max_frames."""
    too_short: bool
    """It holds less than the 5 frames of the shortest video, and tokenize drops it."""


def place(facts: Facts, settings: TokenizeConfig) -> Placement | None:
    """Where tokenize would put the clip; None where its size is not known."""
    if facts.size is None:
        return None
    height, width = facts.size
    bucket = choose_bucket(height, width, settings.latent_side)
    scale = max(bucket.height / height, bucket.width / width)
    crop = 1 - bucket.height * bucket.width / (height * width * scale**2)
    frames = _kept_frames(facts, settings.fps)
    groups = whole_groups(min(frames, settings.max_frames)) if frames else None
    grid = bucket.grid
    return Placement(bucket, round(max(0.0, crop), 4), scale,
                     latent_frames(groups) * grid[0] * grid[1] if groups else None,
                     max(0, frames - settings.max_frames) / settings.fps if frames else 0.0,
                     facts.seconds is not None and groups == 1 < settings.max_frames)


def _kept_frames(facts: Facts, fps: float) -> int | None:
    """Frames at `fps` that the clip holds, counted as decoding counts them at a constant rate."""
    if not facts.frames:
        return None
    if not facts.fps:
        return 1 if facts.frames == 1 else None
    return max(1, math.floor((facts.frames - 0.5) / facts.fps * fps - 1e-6) + 1)

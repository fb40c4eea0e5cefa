"""Keeps the maps of one sample on its way from noise to video, for the film strip."""

from __future__ import annotations

from typing import Protocol

import torch
from PIL import Image

from grn_scale.config.schema import LabelledShape
from grn_scale.sampling.pictures import film_strip
from grn_scale.sampling.video import decode_clips, spread
from grn_scale.tokenizer.video import VideoTokenizer


class Maps(Protocol):
    """What the observer of a sampler sees after a step, like `sampling.sampler.StepMaps`."""

    step: int
    samples: tuple[int, ...]
    shares: tuple[float, ...]
    ended: frozenset[int]

    def predictions(self) -> list[torch.Tensor]: ...

    def mixed(self) -> list[torch.Tensor]: ...


class Film:
    """An observer for `generate`: keeps the mixed map of a sample at a few steps, and its last prediction."""

    def __init__(self, sample: int, steps: int, rows: int = 7) -> None:
        """sample: place in the list that is sampled; rows: pictures of the strip, the result included."""
        self.sample = sample
        self.wanted = frozenset(spread(steps, rows))
        self.rows: list[tuple[str, torch.Tensor]] = []

    def __call__(self, maps: Maps) -> None:
        if self.sample not in maps.samples:
            return
        i = maps.samples.index(self.sample)
        if self.sample in maps.ended:
            self.rows.append((f"result\nstep {maps.step + 1}", maps.predictions()[i].cpu()))
        elif maps.step in self.wanted:
            self.rows.append((f"step {maps.step + 1}\n{100 * maps.shares[i]:.0f} % predicted", maps.mixed()[i].cpu()))

    def strip(self, tokenizer: VideoTokenizer, config: LabelledShape, title: str) -> Image.Image:
        """The rows decoded: what the network read after each step kept, and at the bottom the result."""
        clips = decode_clips(tokenizer, [labels for _, labels in self.rows], config)
        return film_strip([(label, clip) for (label, _), clip in zip(self.rows, clips)], title)

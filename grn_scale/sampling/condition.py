"""What a sample is asked to be, and how the sampler gets there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from grn_scale.config.data_schema import MOST_TEXT_TOKENS
from grn_scale.config.rules import require, require_positive
from grn_scale.config.schema import AdaptiveConfig, ModelConfig, SamplingConfig
from grn_scale.errors import UserError
from grn_scale.model.sequence import Grid


@dataclass(frozen=True)
class SamplingSettings:
    """The refinement sampler's numbers (GRN reference, section 6). ConfigError where one is impossible."""

    steps: int = 50
    tmax: int = 50
    """Length of the schedule; the share of predictions stays at its end from step tmax - 1 on."""
    guidance: float = 4.0
    """Scores are unconditional + guidance * (conditional - unconditional); 1 is no guidance."""
    guidance_start: float = 0.0
    """Guidance acts on a sample from this share of predictions on."""
    temperature: float = 1.0
    shift: float = 1.0
    """Above 1 the share of predictions grows later (as noise.shift bends training)."""
    end_fraction: float = 0.95
    """Largest share of predictions; belongs to the model (`ModelConfig.end_fraction`)."""
    adaptive: AdaptiveConfig | None = None
    """How the number of steps follows from the prediction; None: it does not. With it (whatever `enabled` says, that is
    for run files) `steps` has no effect, and tmax is the most."""
    guidance_end: float = 1.0
    """Guidance acts on a sample up to this share of predictions."""

    def __post_init__(self) -> None:
        require_positive("sampling", steps=self.steps, temperature=self.temperature, shift=self.shift)
        require(self.tmax >= 2, f"sampling.tmax is {self.tmax}, but must be at least 2")
        require(0 < self.end_fraction <= 1, f"end_fraction is {self.end_fraction}, but must lie in (0, 1]")
        require(self.adaptive is None or self.adaptive.tmin <= self.tmax,
                f"adaptive.tmin must not be above tmax ({self.tmax})")

    @classmethod
    def of(cls, config: SamplingConfig, model: ModelConfig) -> SamplingSettings:
        """The settings of a configuration for a model."""
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        adaptive = values.pop("adaptive")
        return cls(**values, end_fraction=model.end_fraction, adaptive=adaptive if adaptive.enabled else None)

    @property
    def most_steps(self) -> int:
        """Steps of the sample that takes longest."""
        return self.tmax if self.adaptive else self.steps

    def guidance_at(self, share: float) -> float:
        """Guidance of a step that is fed `share`."""
        return self.guidance if self.guidance_start <= share <= self.guidance_end else 1.0


@dataclass(frozen=True, eq=False)
class Condition:
    """One sample to be made."""

    text_states: torch.Tensor
    """[n, text_hidden_size]"""
    negative_text_states: torch.Tensor | None
    """[m, text_hidden_size], of the empty or a negative text; None where guidance is 1."""
    thw: tuple[int, int, int]
    """Latent frames, height and width of the whole clip, a given first frame included."""
    ratio_key: float
    """Height / width template of its bucket."""
    first_frame_labels: torch.Tensor | None = None
    """uint8 [D, 1, h, w]: image-to-video; this first latent frame is given."""

    @property
    def predicted_thw(self) -> tuple[int, int, int]:
        """Latent frames, height and width of what is sampled."""
        t, h, w = self.thw
        return t - (self.first_frame_labels is not None), h, w

    def grid(self, text: torch.Tensor) -> Grid:
        """The sample's shape in the packed sequence beside these text states."""
        return Grid(tuple(self.thw), self.ratio_key, text.shape[0], self.first_frame_labels is not None)

    def tokens(self, guided: bool) -> int:
        """Of its branches in the packed sequence; with the unconditional one if `guided`."""
        texts = [self.text_states] + ([self.negative_text_states] if guided else [])
        return sum(grid.visual_tokens + grid.text_tokens + 1 for grid in map(self.grid, texts))

    def check(self, config: ModelConfig, guided: bool) -> None:
        """UserError unless a model of this configuration can sample it, with the unconditional branch if `guided`."""
        t, h, w = self.thw
        first = self.first_frame_labels
        if min(t, h, w) < 1:
            raise UserError(f"a condition asks for {t} x {h} x {w} latents, but each must be at least 1")
        if guided and self.negative_text_states is None:
            raise UserError("guidance needs negative_text_states (of the empty text, where nothing is to be avoided)")
        for states in (self.text_states, self.negative_text_states):
            if states is not None and (states.dim() != 2 or states.shape[1] != config.text_hidden_size):
                raise UserError(f"text states are {list(states.shape)}, but this model takes "
                                f"[tokens, {config.text_hidden_size}]")
            if states is not None and not 1 <= len(states) <= MOST_TEXT_TOKENS:
                raise UserError(f"a text has {len(states)} tokens, but must have 1 to {MOST_TEXT_TOKENS}: even the "
                                "empty text has its end token")
        if first is not None:
            if tuple(first.shape) != (config.label_channels, 1, h, w):
                raise UserError(f"first_frame_labels are {list(first.shape)}, but must be "
                                f"[{config.label_channels}, 1, {h}, {w}]")
            if t < 2:
                raise UserError("a first frame is given, but the clip has no other: ask for at least 2 latents "
                                "(5 frames)")

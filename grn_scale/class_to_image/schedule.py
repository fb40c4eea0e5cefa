"""The class sampler's numbers by step: signal level, guidance and temperature (GRN reference, section 7).

Times are fp32 tensors on the host, computed as the reference does: a bound that a time falls on exactly then decides
alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from grn_scale.config.schema import AdaptiveConfig, require, require_choice, require_positive
from grn_scale.sampling.steps import steps_after, temperature_factor

FROZEN = 0.99
"""Signal level from which on a complexity-aware sample is finished."""


@dataclass(frozen=True)
class ClassSamplingSettings:
    """How an image comes out of noise. ConfigError where a number is impossible."""

    steps: int = 50
    """Steps of every sample; with `adaptive` the most that one takes."""
    schedule: str = "linear"
    """Signal level after step i of n: linear i/n, or cosine 1 - cos(pi/2 * i/n)."""
    guidance: float = 2.35
    """Scores are unconditional + guidance * (conditional - unconditional); 1 is no guidance."""
    guidance_low: float = 0.44
    """Guidance acts at signal levels above this; 0: from the beginning. Below 0 it acts everywhere and grows: with
    weight 1 + guidance * (1 - cos(pi * t^(-guidance_low))) / 2."""
    guidance_high: float = 1.0
    """Guidance acts at signal levels below this (unless guidance_low is below 0)."""
    temperature: float = 1.31
    adaptive: AdaptiveConfig | None = None
    """Complexity-aware: the entropy after adaptive.wp steps decides a sample's number of steps. As in the reference its
    temperature factor always applies."""

    def __post_init__(self) -> None:
        require_choice("sampling.schedule", self.schedule, ("linear", "cosine"))
        require_positive("sampling", steps=self.steps, temperature=self.temperature)
        rule = self.adaptive
        require(rule is None or self.schedule == "linear",
                f"sampling.schedule is {self.schedule}, but complexity-aware sampling is defined for linear alone")
        require(rule is None or rule.tmin <= self.steps,
                f"sampling.steps is {self.steps}, but the fewest steps of complexity-aware sampling (tmin) are "
                f"{rule and rule.tmin}: raise steps, or lower tmin")

    def fixed_times(self) -> torch.Tensor:
        """fp32 [steps + 1]: signal level before each step, and after the last, where it does not depend on the
        sample."""
        places = torch.linspace(0, 1, self.steps + 1)
        return 1 - torch.cos(math.pi / 2 * places) if self.schedule == "cosine" else places

    def next_times(self, step: int, after_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: signal level after a step. after_B: steps that each sample gets after its decision (see `after`);
        what it holds before the decision has no influence."""
        if self.adaptive is None:
            return self.fixed_times()[step + 1].expand(len(after_B))
        begin = self.adaptive.wp
        if step < begin:
            return torch.full((len(after_B),), (step + 1) / self.steps)
        return begin / self.steps + (step + 1 - begin) * ((1 - begin / self.steps) / after_B.float())

    def raw_steps(self, entropy: float) -> float:
        """What the complexity-aware rule asks for after the decision, before bounds and rounding."""
        return self.adaptive.k * entropy + self.adaptive.b

    def after(self, entropy: float) -> int:
        """Steps that a sample gets from the deciding one on, from its relative entropy there."""
        return steps_after(entropy, self.adaptive, self.steps)

    def temperatures(self, step: int, after_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: temperature of each sample in a step; after_B as in `next_times`."""
        rule = self.adaptive
        if rule is None or step < rule.wp:
            return torch.full((len(after_B),), self.temperature)
        factors = torch.tensor([temperature_factor(n) for n in after_B.tolist()])
        return self.temperature * factors

    def guidances(self, times_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: weight of the conditional prediction at these signal levels, 1 where guidance does not act."""
        if self.guidance_low < 0:
            return 1 + self.guidance * (1 - torch.cos(math.pi * times_B ** -self.guidance_low)) / 2
        acts = times_B < self.guidance_high
        if self.guidance_low > 0:
            acts &= times_B > self.guidance_low
        return torch.where(acts, self.guidance, 1.0)

    def ended(self, step: int, times_B: torch.Tensor) -> torch.Tensor:
        """bool [B]: whether samples that have reached these signal levels after a step are finished."""
        if step == self.steps - 1:
            return torch.ones(len(times_B), dtype=torch.bool)
        return times_B >= FROZEN if self.adaptive else torch.zeros(len(times_B), dtype=torch.bool)

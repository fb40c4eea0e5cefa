"""The class sampler's numbers by step: signal level, guidance and temperature (GRN reference, section 7).

Times are fp32 tensors on the host, computed as the reference does: a bound that a time falls on exactly then decides
alike.
"""

from __future__ import annotations

import math

import torch

from grn_scale.config.class_schema import ClassSamplingSettings
from grn_scale.sampling.steps import steps_after, temperature_factor

FROZEN = 0.99
"""Signal level from which on a complexity-aware sample is finished."""


class Schedule:
    """What the settings say of each step."""

    def __init__(self, settings: ClassSamplingSettings) -> None:
        self.settings, self.steps = settings, settings.steps
        self.rule = settings.adaptive if settings.adaptive.enabled else None
        """Of complexity-aware sampling: the entropy after rule.wp steps decides a sample's number of steps."""

    def fixed_times(self) -> torch.Tensor:
        """fp32 [steps + 1]: signal level before each step, and after the last, where it does not depend on the
        sample."""
        places = torch.linspace(0, 1, self.steps + 1)
        return 1 - torch.cos(math.pi / 2 * places) if self.settings.schedule == "cosine" else places

    def next_times(self, step: int, after_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: signal level after a step. after_B: steps that each sample gets after its decision (see `after`);
        what it holds before the decision has no influence."""
        if self.rule is None:
            return self.fixed_times()[step + 1].expand(len(after_B))
        begin = self.rule.wp
        if step < begin:
            return torch.full((len(after_B),), (step + 1) / self.steps)
        return begin / self.steps + (step + 1 - begin) * ((1 - begin / self.steps) / after_B.float())

    def raw_steps(self, entropy: float) -> float:
        """What the complexity-aware rule asks for after the decision, before bounds and rounding."""
        return self.rule.k * entropy + self.rule.b

    def after(self, entropy: float) -> int:
        """Steps that a sample gets from the deciding one on, from its relative entropy there."""
        return steps_after(entropy, self.rule, self.steps)

    def temperatures(self, step: int, after_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: temperature of each sample in a step; after_B as in `next_times`."""
        rule = self.rule
        if rule is None or not rule.temperature_factor or step < rule.wp:
            return torch.full((len(after_B),), self.settings.temperature)
        factors = torch.tensor([temperature_factor(n) for n in after_B.tolist()])
        return self.settings.temperature * factors

    def guidances(self, times_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B]: weight of the conditional prediction at these signal levels, 1 where guidance does not act."""
        guidance, low = self.settings.guidance, self.settings.guidance_low
        if low < 0:
            return 1 + guidance * (1 - torch.cos(math.pi * times_B ** -low)) / 2
        acts = times_B < self.settings.guidance_high
        if low > 0:
            acts &= times_B > low
        return torch.where(acts, guidance, 1.0)

    def ended(self, step: int, times_B: torch.Tensor) -> torch.Tensor:
        """bool [B]: whether samples that have reached these signal levels after a step are finished."""
        if step == self.steps - 1:
            return torch.ones(len(times_B), dtype=torch.bool)
        return times_B >= FROZEN if self.rule else torch.zeros(len(times_B), dtype=torch.bool)

"""The learning rate as a function of the step, and nothing else: there is no scheduler state to save."""

from __future__ import annotations

import math

from grn_scale.config.schema import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, total_steps: int) -> float:
    """Rate of update number `step` (from 0): linear warm-up from warmup_start * peak, then constant, or down to
    end_factor * peak at the last step."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (schedule.warmup_start + (1.0 - schedule.warmup_start) * step / warmup)
    if schedule.kind == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    left = 1.0 - done if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (schedule.end_factor + (1.0 - schedule.end_factor) * left)

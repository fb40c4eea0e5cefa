"""Fits the rule of complexity-aware sampling to a model: how many steps follow from which entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grn_scale.config.schema import AdaptiveConfig
from grn_scale.errors import UserError
from grn_scale.sampling.condition import Condition, SamplingSettings
from grn_scale.sampling.pipeline import GRNPipeline
from grn_scale.sampling.steps import steps_after


@dataclass(frozen=True)
class StepTargets:
    """What the fitted rule should give on the prompts it is fitted to."""

    mean: float
    """Steps on average."""
    spread: float
    """Steps between the 10th and the 90th percentile, where the bounds allow it."""


def decision_entropies(pipeline: GRNPipeline, conditions: Sequence[Condition], settings: SamplingSettings,
                       wp: int, seed: int) -> list[float]:
    """Relative entropy of each condition's prediction at step wp: what the rule decides by. Takes wp + 1 steps."""
    shortest = AdaptiveConfig(enabled=True, k=0.0, b=0.0, wp=wp, tmin=wp + 1)
    found = pipeline.generate(conditions, replace(settings, adaptive=shortest), seed=seed).entropies
    return [entropy for entropy in found if entropy is not None]


def fit_rule(entropies: Sequence[float], targets: StepTargets, rule: AdaptiveConfig, tmax: int) -> AdaptiveConfig:
    """`rule` with k and b that give these entropies the targets' spread and mean, as nearly as rounding allows.

    k is the spread over the entropies' range between the 10th and the 90th percentile; b then follows from the mean by
    bisection. UserError where the mean lies outside [rule.tmin, tmax], or all entropies are equal.
    """
    if not rule.tmin <= targets.mean <= tmax:
        raise UserError(f"the mean of {targets.mean:g} steps must lie between sampling.adaptive.tmin ({rule.tmin}) and "
                        f"sampling.tmax ({tmax})")
    low, high = np.percentile(entropies, [10, 90])
    if high - low < 1e-6:
        raise UserError(f"the entropy of all {len(entropies)} prompts is {low:.4f} at step {rule.wp}: nothing tells "
                        "them apart; give more and other prompts, or a later sampling.adaptive.wp")
    k = targets.spread / (high - low)
    below, above = -k - tmax, k + tmax
    for _ in range(60):
        b = (below + above) / 2
        mean = np.mean(steps_of(entropies, replace(rule, k=k, b=b), tmax))
        below, above = (b, above) if mean < targets.mean else (below, b)
    return replace(rule, enabled=True, k=round(float(k), 3), b=round(float(below + above) / 2, 3))


def steps_of(entropies: Sequence[float], rule: AdaptiveConfig, tmax: int) -> list[int]:
    """Steps in all that the rule gives to samples of these entropies."""
    return [rule.wp + steps_after(entropy, rule, tmax) for entropy in entropies]


def describe_steps(steps: Sequence[int], tmax: int) -> dict[str, Any]:
    """Plain values: mean, percentiles and how often each number of steps occurs."""
    low, median, high = np.percentile(steps, [10, 50, 90])
    counts = {int(n): int(c) for n, c in zip(*np.unique(steps, return_counts=True))}
    return {"mean": round(float(np.mean(steps)), 3), "mean_share_of_tmax": round(float(np.mean(steps)) / tmax, 4),
            "p10": float(low), "median": float(median), "p90": float(high), "different": len(counts), "counts": counts}

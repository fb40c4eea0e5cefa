"""The schedule of the refinement sampler: which share of the labels is a prediction after each step.

Pure functions of the step number (GRN reference, section 6). The map after step i takes each label from the
prediction with probability `predicted_share(i)`, and from the initial noise otherwise.
"""

from __future__ import annotations

import math

from grn_scale.config.schema import AdaptiveConfig
from grn_scale.model.refinement import shift_ratio

END_TOLERANCE = {"v1": 1e-6, "v2": 0.02}
"""Model layout -> how near to 1 the share that is fed to the network has to be for a step to be the last one."""


def progress(step: int, tmax: int) -> float:
    """Place of a step (from 0) in a schedule of tmax - 1 steps, in (0, 1]; later steps stay at its end."""
    return min(1.0, (step + 1) / (tmax - 1))


def steps_after(entropy: float, rule: AdaptiveConfig, tmax: int) -> int:
    """Steps that a sample still gets after its first rule.wp, from its relative entropy at step wp."""
    return min(max(round(rule.k * entropy + rule.b), rule.tmin - rule.wp), tmax - rule.wp)


def adaptive_progress(step: int, tmax: int, wp: int, after: int | None) -> float:
    """As `progress`, where what is left after wp steps is gone through in `after` steps (None: not decided yet).

    after = tmax - wp gives `progress` itself.
    """
    if after is None or step < wp:
        return progress(step, tmax)
    begin = wp / (tmax - 1)
    return min(1.0, begin + (1 - begin) * (step + 1 - wp) / max(1, after - 1))


def temperature_factor(after: int) -> float:
    """Factor on the temperature of a sample that gets `after` steps after the decision (GRN reference, section 7)."""
    return min(max((after - 10) / 40 + 0.5, 0.5), 1.0)


def predicted_share(place: float, shift: float, end_fraction: float) -> float:
    """Probability in [0, 1] that a label is a prediction after the step at `place` (see `progress`)."""
    return end_fraction * (1.0 - math.cos(math.pi / 2 * shift_ratio(place, shift)))


def is_last(step: int, steps: int, share: float, tolerance: float) -> bool:
    """Whether a step that was fed `share` (the realised one) is a sample's last of at most `steps`."""
    return step == steps - 1 or 1.0 - share < tolerance

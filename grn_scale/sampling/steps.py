"""The schedule of the refinement sampler: which share of the labels is a prediction after each step.

Pure functions of the step number (GRN reference, section 6). The map after step i takes each label from the
prediction with probability `predicted_share(i)`, and from the initial noise otherwise.
"""

from __future__ import annotations

import math

from grn_scale.model.refinement import shift_ratio

END_TOLERANCE = {"v1": 1e-6, "v2": 0.02}
"""Model layout -> how near to 1 the share that is fed to the network has to be for a step to be the last one."""


def progress(step: int, tmax: int) -> float:
    """Place of a step (from 0) in a schedule of tmax - 1 steps, in (0, 1]; later steps stay at its end."""
    return min(1.0, (step + 1) / (tmax - 1))


def predicted_share(place: float, shift: float, end_fraction: float) -> float:
    """Probability in [0, 1] that a label is a prediction after the step at `place` (see `progress`)."""
    return end_fraction * (1.0 - math.cos(math.pi / 2 * shift_ratio(place, shift)))


def is_last(step: int, steps: int, share: float, tolerance: float) -> bool:
    """Whether a step that was fed `share` (the realised one) is a sample's last of at most `steps`."""
    return step == steps - 1 or 1.0 - share < tolerance

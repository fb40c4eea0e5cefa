"""Loss spikes: losses far above what the recent ones were, by median and median absolute deviation.

Every process judges alike, since the loss of a step is equal on all.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque

from grn_scale.config.run_schema import SpikesConfig

SIGMA = 1.4826
"""Median absolute deviation times this is the standard deviation of a normal distribution."""
LEAST_SPREAD = 1e-3
"""Of the median: losses that hardly vary are no reason to suspect the next one."""


class Verdict(enum.Enum):
    FINE = "fine"
    SUSPICIOUS = "suspicious"
    """Far above the recent losses; the next ones will tell. What is saved now may be worth nothing."""
    SPIKE = "spike"
    """Suspicious for `patience` steps in a row."""


class SpikeJudge:
    """Judges the losses of a run one after the other.

    A loss that turns out to have been an outlier counts among the recent ones afterwards, as does every fine one;
    those of a spike do not. A loss that is not finite says nothing either way: its step changed no weights.
    """

    def __init__(self, settings: SpikesConfig) -> None:
        self._settings = settings
        self._recent: deque[float] = deque(maxlen=settings.window)
        self._suspects: list[float] = []

    def judge(self, loss: float) -> Verdict:
        """What the loss of the step just done is taken for."""
        if not math.isfinite(loss):
            return Verdict.SUSPICIOUS if self._suspects else Verdict.FINE
        if self._settings.enabled and loss > self.limit():
            self._suspects.append(loss)
            if len(self._suspects) < self._settings.patience:
                return Verdict.SUSPICIOUS
            self._suspects.clear()
            return Verdict.SPIKE
        self._recent.extend([*self._suspects, loss])
        self._suspects.clear()
        return Verdict.FINE

    def limit(self) -> float:
        """Loss above which a step is suspicious; infinite until the window is full."""
        if len(self._recent) < self._settings.window:
            return math.inf
        median = statistics.median(self._recent)
        spread = statistics.median(abs(loss - median) for loss in self._recent)
        return median + self._settings.threshold * max(SIGMA * spread, LEAST_SPREAD * abs(median))

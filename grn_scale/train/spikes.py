"""Loss spikes: losses far above what the recent ones were, by median and median absolute deviation.

Every process judges alike, since the loss of a step is equal on all.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from collections.abc import Iterable

from grn_scale.config.run_schema import SpikesConfig

SIGMA = 1.4826
"""Median absolute deviation times this is the standard deviation of a normal distribution."""
LEAST_SPREAD = 1e-3
"""Of the median: losses that hardly vary are no reason to suspect the next one."""
RISING = 2.0
"""Robust standard deviations above the median from which a loss, right before a suspicious one, belongs to its rise."""


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

    def __init__(self, settings: SpikesConfig, recent: Iterable[tuple[int, float]] = ()) -> None:
        """recent: steps and losses before, where the run goes on from a checkpoint."""
        self._settings = settings
        self._recent: deque[tuple[int, float]] = deque(recent, maxlen=settings.window)
        self._suspects: list[tuple[int, float]] = []
        self.rising_since = 0
        """Step with whose loss the last suspicion began, or the rise that led to it. That loss was measured with the
        weights of the step before, which may be what is wrong; those before that gave a loss like the others."""

    def judge(self, step: int, loss: float) -> Verdict:
        """What the loss of a step, the one just done, is taken for."""
        if not math.isfinite(loss):
            return Verdict.SUSPICIOUS if self._suspects else Verdict.FINE
        if self._settings.enabled and loss > self.limit():
            if not self._suspects:
                self.rising_since = self._begin_of_rise(step)
            self._suspects.append((step, loss))
            if len(self._suspects) < self._settings.patience:
                return Verdict.SUSPICIOUS
            self._suspects.clear()
            return Verdict.SPIKE
        self._recent.extend([*self._suspects, (step, loss)])
        self._suspects.clear()
        return Verdict.FINE

    def limit(self) -> float:
        """Loss above which a step is suspicious; infinite until the window is full."""
        return self._above(self._settings.threshold) if len(self._recent) == self._settings.window else math.inf

    def _above(self, deviations: float) -> float:
        losses = [loss for _, loss in self._recent]
        median = statistics.median(losses)
        spread = statistics.median(abs(loss - median) for loss in losses)
        return median + deviations * max(SIGMA * spread, LEAST_SPREAD * abs(median))

    def _begin_of_rise(self, suspect: int) -> int:
        """First of the consecutive steps up to the suspicious one whose losses lie above what is usual."""
        usual, first = self._above(RISING), suspect
        for step, loss in reversed(self._recent):
            if step != first - 1 or loss <= usual:
                break
            first = step
        return first

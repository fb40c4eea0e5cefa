"""How many values are spread, counted without keeping them."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Spread:
    """How values are spread, in bounded memory: exact sum and ends, the rest to three digits."""

    counts: Counter[float] = field(default_factory=Counter)
    """Value rounded to three digits -> how often."""
    sum: float = 0.0
    min: float = float("inf")
    max: float = float("-inf")

    def add(self, value: float) -> None:
        self.counts[float(f"{value:.3g}")] += 1
        self.sum += value
        self.min, self.max = min(self.min, value), max(self.max, value)

    def summary(self) -> dict[str, float] | None:
        """Count, sum, ends, and the values that 5 %, half and 95 % do not exceed; None for no value."""
        count = self.counts.total()
        if not count:
            return None
        running = list(itertools.accumulate(self.counts[value] for value in sorted(self.counts)))
        at = {name: next(value for value, below in zip(sorted(self.counts), running) if below >= share * count)
              for name, share in (("p5", 0.05), ("median", 0.5), ("p95", 0.95))}
        return {"count": count, "sum": round(self.sum, 3), "min": round(self.min, 3), **at, "max": round(self.max, 3)}

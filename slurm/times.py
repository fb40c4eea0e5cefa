"""Times and durations as people read them."""

from __future__ import annotations

import time


def clock(seconds: float | None) -> str:
    """A Unix time by this machine's clock, to the second; empty for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """In the two units that matter: 42 s, 3 min 5 s, 2 h 10 min, 4 d 7 h."""
    whole = max(0, round(seconds))
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    first = next((i for i, (_, size) in enumerate(units) if whole >= size), len(units) - 1)
    parts = []
    for name, size in units[first:first + 2]:
        amount, whole = divmod(whole, size)
        if amount or not parts:
            parts.append(f"{amount} {name}")
    return " ".join(parts)

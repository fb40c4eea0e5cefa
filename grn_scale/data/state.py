"""Where a sample stream stands: everything a checkpoint has to keep of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from grn_scale.errors import ConfigError


@dataclass(frozen=True)
class DataState:
    """A place between two packs of an epoch. The same for every number of ranks and packs a step."""

    snapshot: str
    """Of the index; of a mixture those of its datasets, joined by commas."""
    epoch: int = 0
    position: int = 0
    """Packs of the epoch already taken."""
    window: int = 0
    """Window of the epoch to go on with, or one before it."""
    window_first: int = 0
    """Packs of the epoch before that window, so that a resume counts none."""
    skip: tuple[str, ...] = ()
    """Keys of samples that could not be read, sorted. Their slots stay in the packs, with weight 0."""
    settings: str = ""
    """The plan's settings, which a stream keeps until its epoch ends."""

    def with_skips(self, keys: Iterable[str]) -> DataState:
        """The same state with more keys to skip (found here, or merged from other ranks)."""
        return replace(self, skip=tuple(sorted({*self.skip, *keys})))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataState:
        """Inverse of `to_dict`. Raises ConfigError where a field is missing, unknown or of another type."""
        try:
            state = cls(**{**values, "skip": tuple(values["skip"])})
            fits = all(isinstance(getattr(state, name), kind) for name, kind in
                       (("snapshot", str), ("epoch", int), ("position", int), ("window", int), ("window_first", int),
                        ("settings", str)))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"the data state {values!r} cannot be read: {error}") from error
        if not fits or min(state.epoch, state.window) < 0 or not 0 <= state.window_first <= state.position:
            raise ConfigError(f"the data state {values!r} cannot be read: epoch, position and window must be whole "
                              "numbers from 0, window_first one up to position, snapshot and settings text")
        return state

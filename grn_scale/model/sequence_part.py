"""A run of consecutive rows of a packed sequence: what a process holds where the sequence is cut (context parallel)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grn_scale.model.sequence import SequenceLayout


@dataclass(frozen=True)
class SequencePart:
    """Rows [start, stop) and the tokens that stand there. All rows here count from `start`.

    Legend as in `SequenceLayout`, small letters for the tokens of this part.
    """

    start: int
    stop: int
    visual_rows: torch.Tensor
    """int64 [v]"""
    text_rows: torch.Tensor
    """int64 [t]"""
    level_rows: torch.Tensor
    """int64 [n]"""
    predicted_rows: torch.Tensor
    """int64 [p] rows of the tokens that are scored."""
    visual: torch.Tensor
    """int64 [v] which of the V visual tokens these are."""
    text: torch.Tensor
    """int64 [t] which of the T text tokens."""
    level: torch.Tensor
    """int64 [n] which of the N samples' level tokens."""
    predicted: torch.Tensor
    """int64 [p] which of the P predicted tokens."""

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    def to(self, device: torch.device | str) -> SequencePart:
        return SequencePart(**{name: value.to(device) if isinstance(value, torch.Tensor) else value
                               for name, value in vars(self).items()})


def part_of(layout: SequenceLayout, rank: int, size: int) -> SequencePart:
    """Part `rank` of `size` equal ones; ValueError where the sequence does not divide.

    Which tokens a part holds is looked up on the layout's device: build it on the CPU, before the layout moves.
    """
    if layout.length % size:
        raise ValueError(f"a sequence of {layout.length} rows does not divide into {size} equal parts")
    length = layout.length // size
    start, stop = rank * length, (rank + 1) * length

    def inside(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = ((rows >= start) & (rows < stop)).nonzero().squeeze(1)
        return rows[chosen] - start, chosen

    visual_rows, visual = inside(layout.visual_rows)
    text_rows, text = inside(layout.text_rows)
    level_rows, level = inside(layout.level_rows)
    predicted_rows, predicted = inside(layout.predicted_rows)
    return SequencePart(start, stop, visual_rows, text_rows, level_rows, predicted_rows, visual, text, level, predicted)

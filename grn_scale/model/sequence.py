"""Where every token of a pack stands in the packed sequence, and who attends to whom.

Layout v2: visual, text and noise-level token of a sample stand together and all see each other. Layout v1:
visual tokens and level see visual, level and text of their sample; text sees text only. Rows are ordered so
that samples of equal length are neighbours: attention then runs as a few batched calls on slices. The order
has no influence on any result, because positions are explicit and samples never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from grn_scale.model.rope import LEVEL_TIME, rotary_angles, time_positions, visual_positions


@dataclass(frozen=True)
class Grid:
    """Shape of one sample in a pack."""

    thw: tuple[int, int, int]
    ratio_key: float
    text_tokens: int
    first_frame: bool = False
    """Image-to-video: frame 0 is given clean and stands behind the frames that are predicted."""

    @property
    def visual_tokens(self) -> int:
        t, h, w = self.thw
        return t * h * w

    @property
    def predicted_tokens(self) -> int:
        t, h, w = self.thw
        return (t - 1 if self.first_frame else t) * h * w


@dataclass(frozen=True)
class AttentionGroup:
    """`count` segments whose `length` query rows are consecutive from row `start` on."""

    start: int
    count: int
    length: int
    keys: torch.Tensor | None
    """int64 [count * key length] rows of the keys and values; None: the same rows as the queries."""

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length

    def to(self, device: torch.device) -> AttentionGroup:
        keys = None if self.keys is None else self.keys.to(device)
        return AttentionGroup(self.start, self.count, self.length, keys)


@dataclass(frozen=True)
class SequenceLayout:
    """Rows of the packed sequence. Legend: S rows, V visual tokens, P predicted, T text tokens, N samples.

    Visual, text and level tokens are listed sample by sample in the order the samples were given, visual
    tokens of a sample in their natural order (time, height, width).
    """

    length: int
    """S, padding included."""
    visual_rows: torch.Tensor
    """int64 [V] row of each visual token."""
    text_rows: torch.Tensor
    """int64 [T]"""
    level_rows: torch.Tensor
    """int64 [N]"""
    visual_sample: torch.Tensor
    """int64 [V] sample of each visual token."""
    visual_index: torch.Tensor
    """int64 [V] number of the token inside its sample."""
    predicted: torch.Tensor
    """int64 [P] the visual tokens that are corrupted and scored."""
    cos: torch.Tensor
    """fp32 [S, head_size / 2]; padding rows are not turned."""
    sin: torch.Tensor
    groups: tuple[AttentionGroup, ...]

    def to(self, device: torch.device | str) -> SequenceLayout:
        device = torch.device(device)
        if self.visual_rows.device == device:
            return self
        moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                 for name, value in vars(self).items()}
        moved["groups"] = tuple(group.to(device) for group in self.groups)
        return SequenceLayout(**moved)


def lay_out(grids: Sequence[Grid], layout: str, head_size: int, length: int | None = None) -> SequenceLayout:
    """SequenceLayout of the samples in a sequence of `length` rows (None: just as many as there are tokens).

    Raises ValueError where the samples do not fit (packs are planned to fit).
    """
    visual_start, text_start, level_row = {}, {}, {}
    groups: list[AttentionGroup] = []
    row = 0

    def shape(i: int) -> tuple[int, int]:
        return grids[i].visual_tokens, grids[i].text_tokens

    order = sorted(range(len(grids)), key=lambda i: (sum(shape(i)), shape(i)))
    if layout == "v2":
        for tokens, members in groupby(order, key=lambda i: sum(shape(i)) + 1):
            members, start = list(members), row
            for i in members:
                visual_start[i], text_start[i] = row, row + grids[i].visual_tokens
                row += tokens
                level_row[i] = row - 1
            groups.append(AttentionGroup(start, len(members), tokens, None))
    else:
        runs = [(pair, list(members)) for pair, members in groupby(sorted(order, key=shape), key=shape)]
        for (visual, _), members in runs:
            for i in members:
                visual_start[i], level_row[i] = row, row + visual
                row += visual + 1
        by_text = sorted(order, key=lambda i: grids[i].text_tokens)
        text_groups = []
        for text, members in groupby(by_text, key=lambda i: grids[i].text_tokens):
            members, start = list(members), row
            for i in members:
                text_start[i] = row
                row += text
            text_groups.append(AttentionGroup(start, len(members), text, None))
        for (visual, text), members in runs:
            keys = torch.cat([torch.cat((torch.arange(visual_start[i], visual_start[i] + visual + 1),
                                         torch.arange(text_start[i], text_start[i] + text))) for i in members])
            groups.append(AttentionGroup(visual_start[members[0]], len(members), visual + 1, keys))
        groups += text_groups
    if length is None:
        length = row
    if row > length:
        raise ValueError(f"samples of {row} tokens do not fit a sequence of {length}")

    positions = torch.zeros(length, 3, dtype=torch.int64)
    visual_rows, text_rows, samples, indices, predicted = [], [], [], [], []
    seen = 0
    for i, grid in enumerate(grids):
        (t, h, w), visual = grid.thw, grid.visual_tokens
        first, frame = visual_start[i], h * w
        rows = torch.arange(first, first + visual)
        if grid.first_frame:
            # noisy frames 1.. stand first, the clean frame behind them
            rows = torch.cat((rows[visual - frame:], rows[:visual - frame]))
            predicted.append(torch.arange(seen + frame, seen + visual))
        else:
            predicted.append(torch.arange(seen, seen + visual))
        visual_rows.append(rows)
        positions[rows] = visual_positions(range(t), h, w, grid.ratio_key)
        text = torch.arange(text_start[i], text_start[i] + grid.text_tokens)
        text_rows.append(text)
        positions[text] = time_positions(torch.arange(grid.text_tokens))
        positions[level_row[i], 0] = LEVEL_TIME
        samples.append(torch.full((visual,), i))
        indices.append(torch.arange(visual))
        seen += visual
    cos, sin = rotary_angles(positions, head_size)
    return SequenceLayout(
        length, _cat(visual_rows), _cat(text_rows),
        torch.tensor([level_row[i] for i in range(len(grids))], dtype=torch.int64),
        _cat(samples), _cat(indices), _cat(predicted), cos, sin, tuple(groups))


def _cat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

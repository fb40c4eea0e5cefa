"""Where every token of a pack stands in the packed sequence, and who attends to whom.

Layout v2: visual, text and noise-level token of a sample stand together and all see each other. Layout v1:
visual tokens and level see visual, level and text of their sample; text sees text only, so its keys and values
are the same at every noise level: `lay_out_texts` and `lay_out_beside_texts` are the two parts of such a pack. Rows
are ordered so that samples of equal length are neighbours: attention then runs as a few batched calls on slices.
The order has no influence on any result, because positions are explicit and samples never see each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
    """int64 [count * key length] rows of the keys and values; None: the same rows as the queries. Rows from the
    sequence's length on are those of texts beside it (see `lay_out_beside_texts`)."""

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length

    @property
    def key_length(self) -> int:
        """Keys that a segment sees."""
        return self.length if self.keys is None else len(self.keys) // self.count

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
    query_starts: torch.Tensor
    """int32 [segments + 1]: queries before each segment, in the order of `groups`."""
    key_starts: torch.Tensor
    """int32 [segments + 1]: keys before each segment."""

    @property
    def predicted_rows(self) -> torch.Tensor:
        """int64 [P] row of each predicted token."""
        return self.visual_rows[self.predicted]

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
    places = _together(grids) if layout == "v2" else _apart(grids)
    if length is None:
        length = places.rows
    if places.rows > length:
        raise ValueError(f"samples of {places.rows} tokens do not fit a sequence of {length}")
    return _sequence(grids, places, head_size, length)


def lay_out_texts(lengths: Sequence[int], head_size: int) -> SequenceLayout:
    """Layout v1's text rows alone: texts of these lengths, each of which sees itself."""
    starts, groups = _place_texts(lengths, 0)
    grids = [Grid((0, 0, 0), 1.0, length) for length in lengths]
    places = _Places(sum(lengths), [0] * len(grids), starts, [], groups)
    return _sequence(grids, places, head_size, places.rows)


def lay_out_beside_texts(grids: Sequence[Grid], text_starts: Sequence[int], head_size: int) -> SequenceLayout:
    """Layout v1's visual and level rows alone, which see each other and the text of their sample.

    The keys and values of the texts stand behind those of the sequence, the text of sample i from row text_starts[i]
    of them on; samples may share one. The layout itself has no text rows.
    """
    starts, runs, rows = _place_visuals(grids)
    levels = [start + grid.visual_tokens for start, grid in zip(starts, grids)]
    groups = _visual_groups(grids, starts, [rows + start for start in text_starts], runs)
    return _sequence([replace(grid, text_tokens=0) for grid in grids],
                     _Places(rows, starts, [rows] * len(grids), levels, groups), head_size, rows)


def ranges(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """int64: counts[i] consecutive numbers from starts[i] on, for each i in turn."""
    start, count = torch.tensor(starts, dtype=torch.int64), torch.tensor(counts, dtype=torch.int64)
    shift = start - (count.cumsum(0) - count)
    return torch.arange(int(count.sum())) + shift.repeat_interleave(count)


@dataclass(frozen=True)
class _Places:
    """Rows that are taken, the first row of each sample's parts, and who attends to whom."""

    rows: int
    visual: list[int]
    text: list[int]
    level: list[int]
    """Empty where the sequence has texts only."""
    groups: list[AttentionGroup]
    """In the order of their rows."""


def _together(grids: Sequence[Grid]) -> _Places:
    """Layout v2: visual, text, level of one sample after the other."""
    tokens = [grid.visual_tokens + grid.text_tokens + 1 for grid in grids]
    order = sorted(range(len(grids)), key=lambda i: (tokens[i], grids[i].visual_tokens))
    visual, groups, row = [0] * len(grids), [], 0
    for length, members in groupby(order, key=lambda i: tokens[i]):
        start = row
        for i in members:
            visual[i] = row
            row += length
        groups.append(AttentionGroup(start, (row - start) // length, length, None))
    text = [start + grid.visual_tokens for start, grid in zip(visual, grids)]
    level = [start + count - 1 for start, count in zip(visual, tokens)]
    return _Places(row, visual, text, level, groups)


def _apart(grids: Sequence[Grid]) -> _Places:
    """Layout v1: visual tokens and level of one sample after the other, then the texts."""
    visual, runs, row = _place_visuals(grids)
    text, text_groups = _place_texts([grid.text_tokens for grid in grids], row)
    level = [start + grid.visual_tokens for start, grid in zip(visual, grids)]
    rows = row + sum(grid.text_tokens for grid in grids)
    return _Places(rows, visual, text, level, _visual_groups(grids, visual, text, runs) + text_groups)


def _place_visuals(grids: Sequence[Grid]) -> tuple[list[int], list[list[int]], int]:
    """Layout v1: the first visual row of each sample, the samples of equal shape in their order, and the rows taken."""

    def shape(i: int) -> tuple[int, int]:
        return grids[i].visual_tokens, grids[i].text_tokens

    runs = [list(members) for _, members in groupby(sorted(range(len(grids)), key=shape), key=shape)]
    starts, row = [0] * len(grids), 0
    for i in (i for members in runs for i in members):
        starts[i] = row
        row += grids[i].visual_tokens + 1
    return starts, runs, row


def _place_texts(lengths: Sequence[int], row: int) -> tuple[list[int], list[AttentionGroup]]:
    """Layout v1: the first row of each text, from `row` on, and the groups of texts of equal length."""
    starts, groups = [0] * len(lengths), []
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for length, members in groupby(order, key=lambda i: lengths[i]):
        begin = row
        for i in members:
            starts[i] = row
            row += length
        groups.append(AttentionGroup(begin, (row - begin) // length, length, None))
    return starts, groups


def _visual_groups(grids: Sequence[Grid], visual: Sequence[int], text: Sequence[int],
                   runs: Sequence[Sequence[int]]) -> list[AttentionGroup]:
    """Layout v1: visual rows and level of a sample see themselves and its text."""
    groups = []
    for members in runs:
        own, words = grids[members[0]].visual_tokens + 1, grids[members[0]].text_tokens
        keys = ranges([row for i in members for row in (visual[i], text[i])], [own, words] * len(members))
        groups.append(AttentionGroup(visual[members[0]], len(members), own, keys))
    return groups


def _sequence(grids: Sequence[Grid], places: _Places, head_size: int, length: int) -> SequenceLayout:
    """The layout's tensors."""
    visual = [grid.visual_tokens for grid in grids]
    frame = [grid.visual_tokens - grid.predicted_tokens for grid in grids]
    # A given first frame stands behind the frames that are predicted.
    visual_rows = ranges([row for start, v, f in zip(places.visual, visual, frame) for row in (start + v - f, start)],
                         [count for v, f in zip(visual, frame) for count in (f, v - f)])
    words = [grid.text_tokens for grid in grids]
    text_rows = ranges(places.text, words)
    level_rows = torch.tensor(places.level, dtype=torch.int64)
    before = torch.tensor([0, *visual]).cumsum(0).tolist()

    positions = torch.zeros(length, 3, dtype=torch.int64)
    if sum(visual):
        positions[visual_rows] = torch.cat([_positions(grid.thw, grid.ratio_key) for grid in grids])
    positions[text_rows] = time_positions(ranges([0] * len(grids), words))
    positions[level_rows, 0] = LEVEL_TIME
    cos, sin = rotary_angles(positions, head_size)
    return SequenceLayout(
        length, visual_rows, text_rows, level_rows,
        visual_sample=torch.arange(len(grids)).repeat_interleave(torch.tensor(visual, dtype=torch.int64)),
        visual_index=ranges([0] * len(grids), visual),
        predicted=ranges([b + f for b, f in zip(before, frame)], [v - f for v, f in zip(visual, frame)]),
        cos=cos, sin=sin, groups=tuple(places.groups),
        query_starts=_starts((group.length, group.count) for group in places.groups),
        key_starts=_starts((group.key_length, group.count) for group in places.groups))


def _starts(runs: Iterable[tuple[int, int]]) -> torch.Tensor:
    """int32: what comes before each of the segments of (length, count), and all of it."""
    lengths = [length for length, count in runs for _ in range(count)]
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@lru_cache(maxsize=64)
def _positions(thw: tuple[int, int, int], ratio_key: float) -> torch.Tensor:
    """Of the visual tokens of a grid; not to be written to. The few grids in use come again and again."""
    t, h, w = thw
    return visual_positions(range(t), h, w, ratio_key)

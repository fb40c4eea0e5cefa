"""Boxes of named global tensors: what every rank hands over, and the geometry that cuts and checks them.

A box is (offset, size), one number a dimension; a scalar has one box, ((), ()).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from grn_scale.errors import UserError

Box = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Chunk:
    """A box of one global tensor, held by this rank. ValueError where the box does not lie in the tensor."""

    name: str
    """Official name of the global tensor."""
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    """First element of the box, one number a dimension."""
    tensor: torch.Tensor
    """The values; its shape is the box's size. A view is welcome: it is read on save and filled in place on load."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "global_shape", tuple(self.global_shape))
        object.__setattr__(self, "offset", tuple(self.offset))
        fits = len(self.global_shape) == len(self.offset) == self.tensor.ndim and all(
            0 <= start <= start + length <= total
            for start, length, total in zip(self.offset, self.tensor.shape, self.global_shape))
        if not fits:
            raise ValueError(f"chunk of {self.name}: a box at {self.offset} of size {tuple(self.tensor.shape)} "
                             f"does not lie in a tensor of shape {self.global_shape}")

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def box(self) -> Box:
        return self.offset, self.size


def whole(name: str, tensor: torch.Tensor) -> Chunk:
    """The chunk that is the entire global tensor."""
    return Chunk(name, tuple(tensor.shape), (0,) * tensor.ndim, tensor)


def fragment_boxes(shape: Sequence[int], start: int, numel: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The range [start, start + numel) of a flattened row-major tensor, cut into the fewest boxes.

    Returns (offset, size, position) in order: fragment[position : position + prod(size)].view(size) are the
    values of the box. At most 2 N - 1 boxes for N dimensions. ValueError where the range leaves the tensor.
    """
    shape = tuple(shape)
    if start < 0 or numel < 0 or start + numel > math.prod(shape):
        raise ValueError(f"elements {start} to {start + numel} do not lie in a tensor of shape {shape}")
    boxes = []

    def emit(prefix: tuple[int, ...], rows: tuple[int, ...], rest: tuple[int, ...]) -> None:
        # `rows` is (first, count) of the one dimension that is cut; the dimensions after it are taken whole.
        position = sum(math.prod(size) for _, size, _ in boxes)
        boxes.append((prefix + rows[:1] + (0,) * len(rest), (1,) * len(prefix) + rows[1:] + rest, position))

    def cut(prefix: tuple[int, ...], begin: int, end: int) -> None:
        rest = shape[len(prefix):]
        if not rest:
            emit(prefix, (), ())
            return
        row = math.prod(rest[1:])
        (first, head), (last, tail) = divmod(begin, row), divmod(end, row)
        if first == last:
            cut(prefix + (first,), head, tail)
            return
        if head:
            cut(prefix + (first,), head, row)
            first += 1
        if last > first:
            emit(prefix, (first, last - first), rest[1:])
        if tail:
            cut(prefix + (last,), 0, tail)

    if numel:
        cut((), start, start + numel)
    return boxes


def intersect(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, or None. Boxes without elements share nothing."""
    offset = tuple(map(max, a[0], b[0]))
    end = tuple(min(p + m, q + n) for p, m, q, n in zip(a[0], a[1], b[0], b[1]))
    if any(stop <= start for start, stop in zip(offset, end)):
        return None
    return offset, tuple(stop - start for start, stop in zip(offset, end))


def narrow(tensor: torch.Tensor, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    """View of a box of `tensor`."""
    return tensor[tuple(slice(start, start + length) for start, length in zip(offset, size))]


def _without(box: Box, taken: Box) -> list[Box]:
    """`box` less `taken`, as boxes."""
    shared = intersect(box, taken)
    if shared is None:
        return [box]
    pieces = []
    offset, size = list(box[0]), list(box[1])
    for axis, (start, length) in enumerate(zip(*shared)):
        for first, stop in ((offset[axis], start), (start + length, offset[axis] + size[axis])):
            if stop > first:
                pieces.append((tuple(offset[:axis] + [first] + offset[axis + 1:]),
                               tuple(size[:axis] + [stop - first] + size[axis + 1:])))
        offset[axis], size[axis] = start, length
    return pieces


def first_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share elements, or None. Sweeps along the axis on which the boxes differ most."""
    if not boxes or not boxes[0][0]:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    axis = max(range(len(boxes[0][0])), key=lambda d: len({offset[d] for offset, _ in boxes}))
    active: list[Box] = []
    for box in sorted(boxes, key=lambda b: b[0][axis]):
        start = box[0][axis]
        active = [other for other in active if other[0][axis] + other[1][axis] > start]
        for other in active:
            if intersect(box, other) is not None:
                return other, box
        active.append(box)
    return None


def first_hole(shape: Sequence[int], boxes: Iterable[Box]) -> Box | None:
    """A box of the tensor that none of `boxes` covers, or None."""
    holes: list[Box] = [((0,) * len(shape), tuple(shape))] if math.prod(shape) else []
    for box in boxes:
        holes = [piece for hole in holes for piece in _without(hole, box)]
    return holes[0] if holes else None


def check_cover(name: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """UserError unless the boxes cover the tensor completely and no element twice."""
    overlap = first_overlap(boxes)
    if overlap is not None:
        (a, m), (b, n) = overlap
        raise UserError(f"tensor {name} of shape {tuple(shape)}: the chunks at {a} of size {m} and at {b} of size {n} "
                        "overlap; copies of one part on several ranks must be cut alike")
    if sum(math.prod(size) for _, size in boxes) != math.prod(shape):
        offset, size = first_hole(shape, boxes)
        raise UserError(f"tensor {name} of shape {tuple(shape)}: no rank gave the elements at {offset} of size {size}; "
                        "together the chunks of all ranks must cover every tensor")

"""Geometry of chunks, against brute force over every element."""

import itertools
import math
import random

import pytest
import torch

from grn_scale.checkpoint.chunks import (
    Chunk,
    check_cover,
    first_hole,
    first_overlap,
    fragment_boxes,
    intersect,
    narrow,
    whole,
)
from grn_scale.errors import UserError

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (3, 1, 4), (1, 2, 1), (2, 2, 3, 2), (2, 1, 2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_fragment_is_cut_into_boxes_that_give_it_back(shape):
    total = math.prod(shape)
    values = torch.arange(total).reshape(shape)
    for start, end in itertools.combinations(range(total + 1), 2):
        fragment = values.reshape(-1)[start:end]
        rebuilt = torch.full(shape, -1)
        position = 0
        boxes = fragment_boxes(shape, start, end - start)
        for offset, size, begin in boxes:
            assert begin == position
            position += math.prod(size)
            narrow(rebuilt, offset, size).copy_(fragment[begin:position].view(size))
        assert position == end - start
        expected = torch.full((total,), -1)
        expected[start:end] = fragment
        assert torch.equal(rebuilt.reshape(-1), expected)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def fewest_boxes(shape, start, end):
    """Least number of consecutive runs of [start, end) that are boxes, by dynamic programming over all cuts."""
    def is_box(a, b):
        index = [i for i in itertools.product(*map(range, shape))][a:b]
        extent = [len({i[d] for i in index}) for d in range(len(shape))]
        return math.prod(extent) == b - a
    best = {start: 0}
    for b in range(start + 1, end + 1):
        best[b] = min(best[a] + 1 for a in range(start, b) if is_box(a, b))
    return best[end]


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2), (3, 1, 4)], ids=str)
def test_a_fragment_is_cut_into_the_fewest_boxes(shape):
    for start, end in itertools.combinations(range(math.prod(shape) + 1), 2):
        assert len(fragment_boxes(shape, start, end - start)) == fewest_boxes(shape, start, end)


def test_an_empty_fragment_has_no_boxes_and_one_outside_is_refused():
    assert fragment_boxes((3, 4), 5, 0) == []
    assert fragment_boxes((), 0, 1) == [((), (), 0)]
    for start, numel in ((-1, 2), (11, 2), (0, 13), (0, -1)):
        with pytest.raises(ValueError, match="do not lie"):
            fragment_boxes((3, 4), start, numel)


def elements(box):
    return set(itertools.product(*(range(start, start + length) for start, length in zip(*box))))


def random_box(draw, shape):
    offset = tuple(draw.randrange(n) for n in shape)
    return offset, tuple(draw.randint(1, n - o) for n, o in zip(shape, offset))


@pytest.mark.parametrize("shape", [(6,), (4, 5), (3, 4, 3)], ids=str)
def test_intersection_overlap_and_hole_agree_with_counting_elements(shape):
    draw = random.Random(str(shape))
    for _ in range(200):
        boxes = [random_box(draw, shape) for _ in range(draw.randint(2, 5))]
        shared = intersect(boxes[0], boxes[1])
        assert (elements(shared) if shared else set()) == elements(boxes[0]) & elements(boxes[1])

        pairs = [(a, b) for a, b in itertools.combinations(boxes, 2) if elements(a) & elements(b)]
        overlap = first_overlap(boxes)
        assert (overlap is None) == (not pairs)
        if overlap:
            assert elements(overlap[0]) & elements(overlap[1])

        left = elements(((0,) * len(shape), shape)) - set().union(*map(elements, boxes))
        hole = first_hole(shape, boxes)
        assert (hole is None) == (not left)
        if hole:
            assert elements(hole) <= left


def test_a_complete_cover_passes_and_holes_and_overlaps_name_tensor_and_place():
    check_cover("w", (4, 6), [((0, 0), (4, 2)), ((0, 2), (1, 4)), ((1, 2), (3, 4))])
    check_cover("scalar", (), [((), ())])
    check_cover("empty", (0, 3), [])
    with pytest.raises(UserError, match=r"tensor w .*\(1, 2\) of size \(3, 4\)"):
        check_cover("w", (4, 6), [((0, 0), (4, 2)), ((0, 2), (1, 4))])
    with pytest.raises(UserError, match="tensor w .*overlap"):
        check_cover("w", (4, 6), [((0, 0), (4, 4)), ((0, 2), (2, 2))])
    with pytest.raises(UserError, match="tensor scalar .*no rank gave"):
        check_cover("scalar", (), [])


def test_a_chunk_outside_its_tensor_is_refused():
    assert whole("w", torch.zeros(2, 3)).box == ((0, 0), (2, 3))
    for offset, size in (((1, 0), (2, 3)), ((0,), (2, 3)), ((-1, 0), (1, 3)), ((0, 0), (2,))):
        with pytest.raises(ValueError, match="chunk of w"):
            Chunk("w", (2, 3), offset, torch.zeros(size))

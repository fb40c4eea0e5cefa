"""The parts of a weight that tensor-parallel ranks hold make up the official weight, each element once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from grn_scale.config.schema import ModelConfig
from grn_scale.model.transformer import GRN
from grn_scale.parallel.placement import Placement, head_placements, layer_placements

MODEL = ModelConfig(hidden_size=96, num_layers=2, num_heads=12, ffn_hidden_size=144, num_chunks=2,
                    text_hidden_size=32, rounds=2)


def held(size: int, rank: int) -> list[Placement]:
    parts = [layer_placements(MODEL, layer, rank, size) for layer in range(MODEL.num_layers)]
    return [placement for part in (*parts, head_placements(MODEL, rank, size)) for placement in part.values()]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_cover_every_official_tensor_and_overlap_in_none(size: int) -> None:
    with torch.device("meta"):
        official = {name: tuple(p.shape) for name, p in GRN(MODEL).named_parameters()}
    shapes = {piece.name: piece.global_shape for placement in held(size, 0) for piece in placement.pieces}
    assert shapes.items() <= official.items()
    assert {name for name in official if name.startswith(("block_chunks.", "head."))} == shapes.keys()
    counts = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    shared = {piece.name for placement in held(size, 0) if placement.split_dim is None for piece in placement.pieces}
    for rank in range(size):
        for piece in (piece for placement in held(size, rank) for piece in placement.pieces):
            counts[piece.name][piece.global_index] += 1
    assert {name: set(count.unique().tolist()) for name, count in counts.items()} == {
        name: {size if name in shared else 1} for name in counts}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_pieces_of_a_local_parameter_fill_it_without_overlap(size: int) -> None:
    for placement in held(size, size - 1):
        shape = [max(p.local_offset[d] + p.size[d] for p in placement.pieces)
                 for d in range(len(placement.pieces[0].size))]
        filled = torch.zeros(shape, dtype=torch.int)
        for piece in placement.pieces:
            filled[piece.local_index] += 1
        assert Counter(filled.flatten().tolist()) == {1: filled.numel()}

"""Weights of a GRN pipeline stage as a rank holds them, in the order in which the engine lists them.

The shapes are those of `grn_scale.parallel.placement` and `grn_scale.model.transformer.InputEmbedding`, here as plain
numbers: nothing of torch is needed to count them.
"""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.schema import ModelConfig, ParallelConfig
from grn_scale.perf.flops import LEVEL_FEATURES


@dataclass(frozen=True)
class Block:
    """Weights whose gradients appear together: the embedding, one layer, or the head."""

    matrices: tuple[int, ...]
    """Elements of each tensor that is decayed (two dimensions)."""
    vectors: tuple[int, ...]
    """Elements of each tensor that is not (one dimension)."""

    @property
    def count(self) -> int:
        return sum(self.matrices) + sum(self.vectors)


@dataclass(frozen=True)
class Chunk:
    """What one virtual stage holds."""

    embedding: Block | None
    """On the first one of all."""
    layers: tuple[Block, ...]
    head: Block | None
    """On the last one of all."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """First to last, in the order of the forward pass."""
        return tuple(block for block in (self.embedding, *self.layers, self.head) if block is not None)


def stage_chunks(model: ModelConfig, parallel: ParallelConfig, stage: int) -> tuple[Chunk, ...]:
    """The virtual chunks of a pipeline stage on one tensor-parallel rank."""
    chunks = parallel.virtual_pipeline
    count = model.num_layers // (parallel.pipeline * chunks)
    return tuple(Chunk(
        _embedding(model) if stage == chunk == 0 else None, (_layer(model, parallel.tensor),) * count,
        _head(model, parallel.tensor) if (stage, chunk) == (parallel.pipeline - 1, chunks - 1) else None)
        for chunk in range(chunks))


def _embedding(model: ModelConfig) -> Block:
    """Whole on every tensor-parallel rank: labels, text, and the two layers of the noise level."""
    width = model.hidden_size
    inputs = (model.label_channels * model.classes, model.text_hidden_size, LEVEL_FEATURES, width)
    return Block(tuple(width * each for each in inputs), (width,) * len(inputs))


def _layer(model: ModelConfig, tensor: int) -> Block:
    """megatron's order: attention's output and fused input, then the MLP's fused input (gate and up) and output."""
    width, ffn, head = model.hidden_size, model.ffn_hidden_size, model.head_size
    return Block((width * width // tensor, 3 * width * width // tensor, 2 * width * ffn // tensor,
                  width * ffn // tensor), (width, width, head, head))


def _head(model: ModelConfig, tensor: int) -> Block:
    rows = model.label_channels * model.classes // tensor
    return Block((rows * model.hidden_size,), (model.hidden_size, rows))

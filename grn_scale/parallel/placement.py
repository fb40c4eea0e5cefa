"""Where each local parameter of a stage lies inside the official, unfused, global parameters.

megatron fuses q, k and v (interleaved by head) and gate and up (halves of each rank's rows), and cuts weights
over tensor-parallel ranks. A `Piece` is one rectangle of a local parameter that is also a rectangle of one
official parameter; initialisation and checkpoints need nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.schema import ModelConfig


@dataclass(frozen=True)
class Piece:
    name: str
    """Official name."""
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def local_index(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.local_offset, self.size))

    @property
    def global_index(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.global_offset, self.size))


@dataclass(frozen=True)
class Placement:
    """Pieces that cover a local parameter completely."""

    pieces: tuple[Piece, ...]
    split_dim: int | None
    """Dimension cut over tensor-parallel ranks; None for a parameter that all of them hold."""


def whole(name: str, shape: tuple[int, ...]) -> Placement:
    zero = (0,) * len(shape)
    return Placement((Piece(name, shape, zero, zero, shape),), None)


def layer_prefix(config: ModelConfig, layer: int) -> str:
    """Official prefix of a layer counted from 0."""
    per_chunk = config.num_layers // config.num_chunks
    return f"block_chunks.{layer // per_chunk}.module.{layer % per_chunk}"


def layer_placements(config: ModelConfig, layer: int, tensor_rank: int, tensor_size: int) -> dict[str, Placement]:
    """Placement of every parameter of a megatron layer, by its name inside the layer."""
    hidden, ffn, head = config.hidden_size, config.ffn_hidden_size, config.head_size
    heads, ffn_local = config.num_heads // tensor_size, ffn // tensor_size
    prefix = layer_prefix(config, layer)
    qkv = []
    for local_head in range(heads):
        row = (tensor_rank * heads + local_head) * head
        for i, name in enumerate("qkv"):
            qkv.append(Piece(f"{prefix}.attn.{name}_proj.weight", (hidden, hidden), (row, 0),
                             ((3 * local_head + i) * head, 0), (head, hidden)))
    gate_up = [
        Piece(f"{prefix}.mlp.{name}_proj.weight", (ffn, hidden), (tensor_rank * ffn_local, 0), (i * ffn_local, 0),
              (ffn_local, hidden)) for i, name in enumerate(("gate", "up"))]
    return {
        "input_layernorm.weight": whole(f"{prefix}.input_layernorm.weight", (hidden,)),
        "self_attention.linear_qkv.weight": Placement(tuple(qkv), 0),
        "self_attention.q_layernorm.weight": whole(f"{prefix}.attn.q_norm.weight", (head,)),
        "self_attention.k_layernorm.weight": whole(f"{prefix}.attn.k_norm.weight", (head,)),
        "self_attention.linear_proj.weight": Placement((
            Piece(f"{prefix}.attn.o_proj.weight", (hidden, hidden), (0, tensor_rank * heads * head), (0, 0),
                  (hidden, heads * head)),), 1),
        "pre_mlp_layernorm.weight": whole(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
        "mlp.linear_fc1.weight": Placement(tuple(gate_up), 0),
        "mlp.linear_fc2.weight": Placement((
            Piece(f"{prefix}.mlp.down_proj.weight", (hidden, ffn), (0, tensor_rank * ffn_local), (0, 0),
                  (hidden, ffn_local)),), 1),
    }


def head_placements(config: ModelConfig, tensor_rank: int, tensor_size: int) -> dict[str, Placement]:
    """Placement of the head, whose rows (label channel * K + class) are cut by label channel."""
    hidden, rows = config.hidden_size, config.label_channels * config.classes
    local = rows // tensor_size
    return {
        "norm.weight": whole("head.norm.weight", (hidden,)),
        "proj.weight": Placement((
            Piece("head.proj.weight", (rows, hidden), (tensor_rank * local, 0), (0, 0), (local, hidden)),), 0),
        "proj.bias": Placement((Piece("head.proj.bias", (rows,), (tensor_rank * local,), (0,), (local,)),), 0),
    }

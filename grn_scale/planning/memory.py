"""Bytes that the fullest rank of a dense transformer's training step holds at its peak.

States: Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054, section 3.1. Activations: Korthikanti et al. 2022, arXiv
2205.05198, equations 1 to 6; their 34 bytes a token, hidden unit and layer are written out here so that gated MLPs,
grouped keys and values, missing dropout masks and fused attention follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from grn_scale.planning.hardware import load_efficiencies
from grn_scale.planning.layout import Layout, Software
from grn_scale.planning.pipeline import held
from grn_scale.planning.shape import Shape

GIB = 1 << 30
LOSS_BYTES = {"torch": 12, "megatron": 6}
"""Of a logit. PyTorch: in bf16, in fp32, as logarithm of its probability, and the gradient in bf16. Megatron's
vocabulary-parallel loss: in bf16, and in fp32, which the gradient overwrites. Chosen on torchtitan-8B-8gpu-fsdp8-cp1
and fpdt-llama3-8B-ul-z3."""
LIVE, BUCKET = 1e9, 5e8
"""Parameters that ZeRO-3 keeps whole, and gradients that it reduces together, or one tensor that is larger: defaults of
DeepSpeed's `stage3_max_live_parameters` and `reduce_bucket_size` (deepspeed.ai, configuration)."""
TILE = 16
"""Pieces of a tiled MLP and loss, at least."""


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    """Weights, and with a pipeline gradients, of sharded layers while they are whole."""
    activations: float
    running: float
    """What only the layer that runs needs."""
    loss: float

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Peak of what is in use, and what lies unused between it. The loss and a layer do not run at the same time."""
        return (1 + load_efficiencies().fragmentation) * (self._all - min(self.running, self.loss))

    @property
    def reserved(self) -> float:
        """Peak of what PyTorch's allocator has taken from the device: it keeps the blocks of loss and layers, which are
        of different sizes, side by side."""
        return (1 + load_efficiencies().fragmentation) * self._all

    @property
    def _all(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))


def layer_activations(shape: Shape, layout: Layout, software: Software) -> float:
    """Bytes a layer keeps for the backward pass of one token, on one rank, with nothing recomputed.

    With sequence parallelism all of it is cut by tp, otherwise what lies outside the matrix products is whole.
    """
    h, keys = shape.hidden, 2 * shape.kv_width
    stored = 1 if software.fp8 and not layout.fsdp else 2
    outside = 2 * 2 * h + 2 * stored * h + (2 * h if software.dropout else 0)
    if shape.cross_attention:
        outside += 2 * h + stored * h
    inside = 2 * (h + keys) + stored * h + (4 if shape.gated else 2) * shape.ffn + stored * shape.ffn
    if shape.cross_attention:
        inside += 2 * h + stored * h
    return (outside / (layout.tp if layout.sp else 1)) + inside / layout.tp


def attention_scores(shape: Shape, layout: Layout) -> float:
    """Bytes of softmax, dropout mask and result of dropout for one token: 5 a s (arXiv 2205.05198, equation 2)."""
    return 5 * shape.heads * shape.sequence / layout.tp


def kept(shape: Shape, layout: Layout, software: Software) -> float:
    """Bytes a layer keeps for one token with the layout's recomputation."""
    whole = layer_activations(shape, layout, software)
    scores = attention_scores(shape, layout) if software.attention == "unfused" else 0.0
    sequence_cut = layout.tp if layout.sp else 1
    less = {"none": whole + scores, "selective": whole, "operators": whole * load_efficiencies().operators_kept,
            "full": 0.0 if layout.offload_activations else 2 * shape.hidden / sequence_cut}[layout.recompute]
    return layout.recompute_share * less + (1 - layout.recompute_share) * (whole + scores)


def loss_bytes(shape: Shape, layout: Layout) -> float:
    """Bytes of the logits of a micro-batch and of what the loss makes of them."""
    each = LOSS_BYTES["torch" if layout.fsdp else "megatron"]
    return layout.tokens(shape) * shape.vocab / layout.tp * each / (TILE if layout.tiled else 1)


def memory(shape: Shape, layout: Layout, software: Software) -> Memory:
    """Memory of the rank that holds most: of the first pipeline stage, or of the last with its head."""
    stages = ["first"] if layout.pp == 1 else ["first", "last"]
    return max((_of_stage(shape, layout, software, stage) for stage in stages), key=lambda each: each.total)


def _of_stage(shape: Shape, layout: Layout, software: Software, stage: str) -> Memory:
    layers = math.ceil(shape.layers / layout.pp)
    ends = (1 if shape.tied else 2) if layout.pp == 1 else 1
    parameters = (layers * shape.layer_parameters + ends * shape.embedding) / layout.tp
    weights, gradients, optimizer, gathered = _states(shape, layout, software, parameters)

    tokens = layout.tokens(shape)
    in_flight = held(layout.pp, layout.vpp, layout.micro_batches) if stage == "first" else 1.0
    activations = layers * in_flight * tokens * kept(shape, layout, software)
    working = layer_activations(shape, layout, software)
    running = 0.0
    if layout.recompute == "full":
        share = 1 / TILE if layout.tiled else 1.0
        running += tokens * (working * share + 4 * shape.hidden)
    # Gradients of the widest tensors of the layer that runs, and the gathered input of a sequence-parallel region.
    running += tokens * (2 * shape.hidden + (0 if layout.tiled else
                                                 (2 if shape.gated else 1) * 2 * shape.ffn / layout.tp))
    if layout.sp:
        running += 2 * tokens * 2 * shape.hidden
    loss = 0.0
    if layout.pp == 1 or stage == "last":
        loss = loss_bytes(shape, layout)
    return Memory(weights, gradients, optimizer, gathered, activations, running, loss)


def _states(shape: Shape, layout: Layout, software: Software, parameters: float) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer and what is gathered; parameters: what a tensor-parallel rank has."""
    if layout.zero == 3:
        # FSDP shards fp32 weights, which are the masters too; ZeRO-3 a bf16 copy beside them. Both hold 16 bytes.
        weight, master = (4, 8) if layout.fsdp else (2, 12)
        gradient = 16 - weight - master
        layer = shape.layer_parameters / layout.tp
        if layout.fsdp:  # two layers, or a layer and the embedding, and a layer's gradients
            gathered = 2 * 2 * max(layer, shape.embedding / layout.tp) + 4 * layer
        else:
            widest = max(shape.hidden * shape.ffn, shape.embedding) / layout.tp
            gathered = sum(2 * max(widest, min(parameters, most)) for most in (LIVE, BUCKET))
        if layout.pp > 1:  # gathered once a step, and gradients summed whole, not again for each micro-batch
            gathered = (2 + 4) * parameters
        weights, gradients, optimizer = (parameters * each / layout.shards for each in (weight, gradient, master))
        if layout.shards == 1:
            gathered = 0.0
    else:
        weights = 2 * parameters
        gradients = software.gradient_bytes * parameters / (layout.shards if layout.zero == 2 else 1)
        optimizer = 12 * parameters / (layout.shards if layout.zero else 1)
        gathered = 0.0
    if layout.offload_weights:
        weights = 0.0
    if layout.offload_optimizer:  # gradients leave as they are made
        gradients = optimizer = 0.0
    return weights, gradients, optimizer, gathered

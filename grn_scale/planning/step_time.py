"""Seconds of a dense transformer's training step, part by part.

Matrix products take their FLOPs at the share of the peak that large ones reach, and the time of reading and writing
their operands beside it: small and narrow ones are slower for that reason alone. Everything between them takes the
bytes it moves. Communication that the software hides adds what is longer than the computation beside it, and a small
share of the shorter one, since both use the same memory and multiprocessors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from grn_scale.planning.communication import group
from grn_scale.planning.flops import TEXT_TOKENS
from grn_scale.planning.hardware import Efficiencies, Gpu
from grn_scale.planning.layout import Layout, Software
from grn_scale.planning.pipeline import bubble
from grn_scale.planning.shape import Shape

BACKWARD_ATTENTION = 2.5
"""Fused attention makes five products backward for two forward (Dao 2023, arXiv 2307.08691, section 3.1)."""
UNFUSED_SCORE_BYTES = (14, 22)
"""Of one score, forward and backward: products, masked softmax and dropout each read and write it in 16 bits."""
OPTIMIZER_BYTES = 34
"""Of an owned parameter: gradient and its norm, master and two moments read; those and the weight written."""
LOSS_BYTES = 52
"""Of a logit that loss and gradient read and write in fp32, in Megatron-LM's vocabulary-parallel cross entropy: cast,
maximum, difference, exponential, sum and quotient, then the gradient and its cast."""
TORCH_LOSS_BYTES = 28
"""The same with PyTorch's cross entropy: cast, log-softmax, its gradient and the cast of that."""
KERNELS = 25
"""Of a layer's forward pass; the backward pass has twice as many."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the critical path, by part; each includes what recomputation adds, except `recompute`."""

    matmul: float
    attention: float
    elementwise: float
    recompute: float
    tensor: float
    context: float
    bubble: float
    imbalance: float
    """What the fullest pipeline stage has more than its share of the layers: the output head, or a layer."""
    pipeline: float
    data: float
    optimizer: float
    encoding: float
    """Of samples by another model, where the program does it between steps."""
    step: float
    """Of each step whatever its size: reading data, the norm of the gradient, logging."""
    stragglers: float
    hidden: float
    """Communication that runs beside the computation: not part of the total."""

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self) if part.name != "hidden")


@dataclass(frozen=True)
class Layer:
    """Seconds of one layer and micro-batch on one GPU, (forward, backward)."""

    matmul: tuple[float, float]
    attention: tuple[float, float]
    elementwise: tuple[float, float]
    tensor: tuple[float, float]
    context: tuple[float, float]

    def of(self, direction: int) -> float:
        return sum(getattr(self, part.name)[direction] for part in fields(self))


def clock(gpu: Gpu, watts: float | None) -> float:
    """Clock under a power limit over the usual one: power goes with about its third power (voltage falls with it)."""
    return min(1.0, (watts / gpu.watts) ** (1 / 3)) if watts else 1.0


@dataclass(frozen=True)
class Machine:
    """A GPU, what is reached of it, and a power limit where it has one of its own."""

    gpu: Gpu
    reached: Efficiencies
    watts: float | None = None

    def product(self, m: float, n: float, k: float, fp8: bool) -> float:
        """Seconds of a matrix product [m, k] x [k, n]."""
        key = f"{self.gpu.architecture}_{'fp8' if fp8 else 'bf16'}"
        rate = self.gpu.peak(fp8) * self.reached.matmul[key] * clock(self.gpu, self.watts)
        moved = (1 if fp8 else 2) * (m * k + k * n) + 2 * m * n
        return 2 * m * n * k / rate + moved / (self.gpu.bandwidth * self.reached.bandwidth)

    def move(self, size: float) -> float:
        """Seconds in which elementwise kernels read and write `size` bytes."""
        return size / (self.gpu.bandwidth * self.reached.bandwidth)

    def hide(self, communication: float, computation: float, leak: float) -> float:
        """Seconds that communication adds to the computation it runs beside."""
        return max(0.0, communication - computation) + leak * min(communication, computation)


def layer_time(shape: Shape, layout: Layout, software: Software, machine: Machine) -> Layer:
    """Seconds of one layer for one micro-batch."""
    tokens, tp, h = layout.tokens(shape), layout.tp, shape.hidden
    slower = machine.reached.diffusion if software.diffusion else 1.0
    attention = _both(slower, _attention(shape, layout, software, machine))
    matmul = _both(slower, _matmul(shape, layout, software, machine))

    outside = 20 * h + (8 * h if shape.cross_attention else 0) + (6 * h if software.dropout else 0)
    if software.diffusion:  # scale, shift and gate by the noise level, of two branches
        outside += 24 * h
    inside = 8 * (h + shape.kv_width) + (6 if shape.gated else 4) * shape.ffn
    if software.fp8:  # casts: bf16 is read and two 8-bit forms are written, of each product's input
        inside += 4 * (shape.ffn + h)
        outside += 8 * h
    passes = machine.reached.elementwise_fused if software.fused else machine.reached.elementwise_eager
    moved = passes * tokens * (outside / (tp if layout.sp else 1) + inside / tp)
    launch = KERNELS * machine.reached.kernel_latency * passes
    elementwise = (machine.move(moved) + launch, 2 * (machine.move(moved) + launch))

    ring = group(machine.gpu, machine.reached, tp, 1)
    exchange = 2 * ring.all_reduce(2 * tokens * h)
    if software.overlap:
        exchange *= machine.reached.exposed_tensor
    context = _context(shape, layout, software, machine, attention)
    return Layer(matmul, attention, elementwise, (exchange, exchange), context)


def _both(factor: float, seconds: tuple[float, float]) -> tuple[float, float]:
    return factor * seconds[0], factor * seconds[1]


def _matmul(shape: Shape, layout: Layout, software: Software, machine: Machine) -> tuple[float, float]:
    tokens, tp, h = layout.tokens(shape), layout.tp, shape.hidden
    products = [((h + 2 * shape.kv_width) / tp, h), (h, h / tp), ((2 if shape.gated else 1) * shape.ffn / tp, h),
                (h, shape.ffn / tp)]
    if shape.cross_attention:
        products += [(h / tp, h), (h, h / tp)]
    seconds = sum(machine.product(tokens, n, k, software.fp8) for n, k in products)
    return seconds, 2 * seconds


def _attention(shape: Shape, layout: Layout, software: Software, machine: Machine) -> tuple[float, float]:
    half = 0.5 if shape.causal else 1.0
    sequences = layout.micro_batch
    pairs = sequences * shape.sequence**2 / layout.cp / layout.tp
    cross = 4 * sequences * shape.sequence * TEXT_TOKENS * shape.hidden / layout.cp / layout.tp * shape.cross_attention
    rate = machine.gpu.bf16 * clock(machine.gpu, machine.watts)
    if software.attention == "unfused":
        products = 4 * pairs * shape.hidden / (machine.reached.unfused_attention * rate)
        scores = pairs * shape.heads
        return (products + machine.move(UNFUSED_SCORE_BYTES[0] * scores),
                2 * products + machine.move(UNFUSED_SCORE_BYTES[1] * scores))
    forward, backward = machine.reached.attention[f"{machine.gpu.architecture}_{software.attention}"]
    length = shape.sequence * half
    long = length / (length + machine.reached.short_attention / 2)
    narrow = min(1.0, shape.head_size / 128) ** machine.reached.narrow_heads
    flops = 4 * pairs * shape.hidden * half + cross
    return (flops / (rate * forward * long * narrow), BACKWARD_ATTENTION * flops / (rate * backward * long * narrow))


def _context(shape: Shape, layout: Layout, software: Software, machine: Machine,
             attention: tuple[float, float]) -> tuple[float, float]:
    """Exchange of context parallelism that the attention does not hide.

    Ulysses: all-to-all of queries, keys, values and result (arXiv 2309.14509, section 3.2). Ring: keys and values go
    round, with their gradients in the backward pass (Liu et al. 2023, Ring Attention, arXiv 2310.01889, section 3).
    """
    if layout.cp == 1:
        return 0.0, 0.0
    ranks = group(machine.gpu, machine.reached, layout.cp, layout.tp)
    tokens = layout.tokens(shape) / layout.tp
    keys = 2 * 2 * tokens * shape.kv_width
    if layout.ulysses:
        seconds = ranks.all_to_all(keys + 2 * 2 * tokens * shape.hidden)
        return seconds, seconds
    slow = machine.reached.torch_ring - 1 if software.torch_ring else 0.0
    leak = machine.reached.leak
    once = (layout.cp - 1) * ranks.send(keys)
    return (machine.hide(once, attention[0], leak) + slow * attention[0],
            machine.hide(2 * once, attention[1], leak) + slow * attention[1])


def step_time(shape: Shape, layout: Layout, software: Software, machine: Machine) -> StepTime:
    """Seconds of a step of `layout.global_batch` sequences."""
    reached, gpu, count = machine.reached, machine.gpu, layout.micro_batches
    layer = layer_time(shape, layout, software, machine)
    again = _recompute(layout, layer)
    per_layer = layer.of(0) + layer.of(1) + again
    tokens = layout.tokens(shape)
    head = 3 * machine.product(tokens, shape.vocab / layout.tp, shape.hidden, False) if shape.vocab else 0.0
    if shape.vocab:
        head += machine.move((TORCH_LOSS_BYTES if layout.fsdp else LOSS_BYTES) * tokens * shape.vocab / layout.tp)
    layers = shape.layers / layout.pp
    # The head is an extra load of the last stage, unless the layers are spread unevenly to make room for it.
    even = shape.layers % layout.pp == 0
    mean = layers * per_layer + head / layout.pp
    stage = layers * per_layer + head if even else max(math.ceil(layers) * per_layer, mean)
    uneven = max(0.0, stage - layers * per_layer - (head if layout.pp == 1 else 0.0))

    working = count * stage
    idle = bubble(layout.pp, layout.vpp, count) * working
    pipeline = _pipeline(shape, layout, software, machine) * count
    data, covered = _data(shape, layout, software, machine, stage, layers)
    parameters = (layers * shape.layer_parameters + 2 * shape.embedding / layout.pp) / layout.tp
    optimizer = _optimizer(layout, machine, parameters)
    encoding = 0.0
    if software.encodes:  # ranks of a context or tensor parallel group encode the same samples
        encoding = count * layout.micro_batch * shape.sequence / reached.encoded_tokens
    total = working + idle + pipeline + data + optimizer + encoding + reached.step_seconds
    nodes = max(1.0, layout.gpus / min(8, gpu.domain))
    each = count * layers
    return StepTime(
        matmul=each * sum(layer.matmul) + (count * head if layout.pp == 1 else 0.0),
        attention=each * sum(layer.attention), elementwise=each * sum(layer.elementwise), recompute=each * again,
        tensor=each * sum(layer.tensor), context=each * sum(layer.context), bubble=idle,
        imbalance=count * uneven, pipeline=pipeline, data=data, optimizer=optimizer,
        encoding=encoding, step=reached.step_seconds, stragglers=total * reached.straggler * math.log2(nodes),
        hidden=covered)


def _recompute(layout: Layout, layer: Layer) -> float:
    forward = {"none": 0.0, "selective": layer.attention[0], "full": layer.of(0),
               "operators": layer.matmul[0] / 2 + layer.elementwise[0]}[layout.recompute]
    return layout.recompute_share * forward


def _pipeline(shape: Shape, layout: Layout, software: Software, machine: Machine) -> float:
    """Sends of a micro-batch that nothing hides: an activation and a gradient for each chunk, cut by tensor parallelism
    and gathered again (arXiv 2104.04473, section 4.1)."""
    if layout.pp == 1:
        return 0.0
    stages = group(machine.gpu, machine.reached, layout.pp, layout.gpus // layout.pp)
    seconds = 2 * layout.vpp * stages.send(2 * layout.tokens(shape) * shape.hidden / layout.tp)
    return seconds * (machine.reached.exposed_tensor if software.overlap else 1.0)


def _data(shape: Shape, layout: Layout, software: Software, machine: Machine, stage: float,
          layers: float) -> tuple[float, float]:
    """Seconds that exchanging gradients and weights adds to a step, and those that are hidden."""
    if layout.shards == 1:
        return 0.0, 0.0
    ranks = group(machine.gpu, machine.reached, layout.shards, layout.tp)
    count = layout.micro_batches
    slow = machine.reached.old_zero3 if software.old_zero3 and ranks.nodes > 1 else 1.0
    if layout.zero == 3 and layout.pp == 1:
        weights = 2 * shape.layer_parameters / layout.tp
        once = layers * (2 * ranks.all_gather(weights) + ranks.reduce_scatter(2 * weights)) / slow
        ends = 2 * 2 * shape.embedding / layout.tp
        once += 2 * ranks.all_gather(ends) / slow
        leak = machine.reached.old_zero3_leak if software.old_zero3 else machine.reached.leak
        return count * machine.hide(once, stage, leak), count * min(once, stage)
    parameters = (layers * shape.layer_parameters + 2 * shape.embedding / layout.pp) / layout.tp
    gradients = software.gradient_bytes * parameters
    if layout.zero:
        reduced, gathered = ranks.reduce_scatter(gradients), ranks.all_gather(2 * parameters)
    else:
        reduced, gathered = ranks.all_reduce(gradients), 0.0
    # Who keeps a share of the gradients only, reduces those of each micro-batch (Rajbhandari et al. 2020, arXiv
    # 1910.02054, section 5.2); pipelines keep them whole until the last one.
    early = count - 1 if layout.zero == 2 and layout.pp == 1 else 0
    seconds = reduced + gathered
    if not software.overlap:
        return early * reduced + seconds, 0.0
    # A chunk's gradients are ready when its last micro-batch is done: those of all chunks but the last one early.
    window, leak = stage * (1 + (layout.pp - 1) * (1 - 1 / layout.vpp)), machine.reached.leak_gradients
    return (early * machine.hide(reduced, stage, leak) + machine.hide(seconds, window, leak),
            early * min(reduced, stage) + min(seconds, window))


def _optimizer(layout: Layout, machine: Machine, parameters: float) -> float:
    owned = parameters / (layout.shards if layout.zero else 1)
    if layout.offload_optimizer:
        rate = min(machine.reached.host_process, machine.reached.host_node / min(8, layout.gpus))
        return OPTIMIZER_BYTES * owned / rate + 6 * owned / machine.gpu.host
    return machine.move(OPTIMIZER_BYTES * owned)

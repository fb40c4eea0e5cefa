"""How long a GRN training step takes, part by part, from what each rank computes and sends.

Rates are the machine's (`Machine`); everything else is counted: FLOPs as in `grn_scale.perf.flops`, bytes of each
exchange from the shapes, and what hides behind what from how the engine runs it. All ranks are taken for equally fast
and all packs for equally full; `grn-scale plan simulate` is for what differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from grn_scale.config.schema import Config
from grn_scale.perf.flops import hardware_flops, model_flops
from grn_scale.planning.grn_budget import TEXT_ENCODER
from grn_scale.planning.grn_machine import Machine
from grn_scale.planning.grn_pack import typical_pack
from grn_scale.planning.grn_parameters import stage_chunks
from grn_scale.planning.step_time import KERNELS

BOTH = 3
"""FLOPs of a matrix product with its two gradients over those of the product."""
ATTENTION_BACKWARD = 2.5
"""Fused attention computes the scores again: five products backward for two forward (arXiv:2307.08691, section 3.1)."""
ADAMW_BYTES = 38
"""Of an owned element: fp32 gradient read; master, two moments and average read and written; bf16 weight written."""
WHOLE_GRADIENT_BYTES = 32
"""Of each fp32 gradient with ZeRO-1 in bf16: flat copy and back, norm, clipping, clearing."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    parts: dict[str, float]
    """What the step is made of; adds up to `seconds`."""
    hidden: dict[str, float]
    """Communication that runs beside computation."""
    tokens: int
    """Of all packs, padding left out."""
    flops: float
    """That the model needs for them: MFU."""
    hardware_flops: float
    """That the GPUs carry out: HFU."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def share_of_peak(self, flops: float, machine: Machine) -> float:
        """FLOPs of the step over what the GPUs' peaks would allow."""
        return flops / (self.seconds * machine.gpu.bf16 * machine.gpus)


def step_time(config: Config, machine: Machine) -> StepTime:
    """StepTime of a legal layout on all GPUs of the machine."""
    parallel, packs = config.parallel, config.data.packs_per_step
    replicas = machine.gpus // (parallel.tensor * parallel.pipeline)
    micro_batches = packs // (replicas // parallel.context)
    rank = _Rank(config, machine)
    stages = [rank.pass_parts(stage) for stage in range(parallel.pipeline)]
    slowest = max(range(len(stages)), key=lambda stage: sum(stages[stage].values()))
    parts = {name: micro_batches * seconds for name, seconds in stages[slowest].items()}
    if parallel.pipeline > 1:
        # (p - 1) / v passes of a mean stage (Narayanan et al. 2021, arXiv:2104.04473, sections 2.2.1 and 2.2.2)
        mean = sum(sum(stage.values()) for stage in stages) / len(stages)
        parts["bubble"] = (parallel.pipeline - 1) / parallel.virtual_pipeline * mean
    computing = sum(parts[name] for name in ("matrix products", "attention", "element-wise"))
    weights = max(sum(block.count for chunk in stage_chunks(config.model, parallel, stage) for block in chunk.blocks)
                  for stage in range(parallel.pipeline))
    zero, hidden_zero = rank.zero(weights, replicas, micro_batches, computing)
    hidden = {"tensor": micro_batches * rank.hidden_tensor(stage_layers(config)), "ZeRO": hidden_zero}
    parts |= {"ZeRO": zero, "optimizer": rank.optimizer(weights, replicas),
              "text encoder": rank.text_encoder(micro_batches), "data": 0.0,
              "fixed, of every step": machine.reached.step_seconds}
    parts["beside each other"] = machine.leak * min(sum(hidden.values()), computing)
    parts["waiting"] = machine.waiting * sum(parts.values())
    pack = typical_pack(config)
    lengths = [(pack.visual, pack.visual, pack.text, pack.clip_tokens)]
    clips = pack.clips * packs
    needed = clips * model_flops(config.model, lengths)
    done = clips * hardware_flops(config.model, parallel, lengths, pack.clip_tokens)
    return StepTime({name: seconds for name, seconds in parts.items() if seconds or name == "data"},
                    {name: seconds for name, seconds in hidden.items() if seconds},
                    packs * config.data.token_budget, needed, done)


def stage_layers(config: Config) -> int:
    """Layers of a pipeline stage."""
    return config.model.num_layers // config.parallel.pipeline


class _Rank:
    """Seconds of what one rank does."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine, self.pack = config, machine, typical_pack(config)
        model, parallel = config.model, config.parallel
        self.width = 2 if config.train.precision == "bf16" else 4
        self.fp32 = machine.fp32
        self.rate = machine.matmul if self.width == 2 else self.fp32
        self.share = 1 / (parallel.tensor * parallel.context)
        self.rows = self.width * config.data.token_budget // parallel.context * model.hidden_size
        self.split = parallel.sequence and parallel.tensor > 1
        modules = parallel.recompute_modules if parallel.recompute == "selective" else ()
        self.full = parallel.recompute == "full"
        self.again_mlp, self.again_attention = self.full or "mlp" in modules, self.full or "core_attn" in modules

    def pass_parts(self, stage: int) -> dict[str, float]:
        """Forward and backward of one micro-batch through a stage."""
        model, parallel, layers = self.config.model, self.config.parallel, stage_layers(self.config)
        width = model.hidden_size
        products = layers * (self._products(3 * width * model.ffn_hidden_size, 2, 3 * model.ffn_hidden_size / width,
                                            BOTH + self.again_mlp)
                             + self._products(4 * width * width, 2, 4, BOTH + self.full))
        tokens, text = self.pack.clip_tokens, self.pack.text if model.layout == "v1" else 0
        pairs = self.pack.clips * (tokens * tokens - text * (tokens - text))
        heads = model.num_heads // parallel.tensor
        uneven = -(-heads // parallel.context) * parallel.context / heads
        forward, backward = self.machine.attention if self.width == 2 else self.machine.attention_fp32
        attention = layers * 4 * width * pairs * self.share * uneven * (
            (1 + self.again_attention) / forward + ATTENTION_BACKWARD / backward)
        parts = {"matrix products": products + self._ends(stage), "attention": attention,
                 "element-wise": layers * self._elementwise()}
        parts["tensor"] = layers * self._tensor()
        parts["context"] = layers * self._context()
        parts["pipeline"] = self._pipeline(stage)
        return parts

    def _products(self, weights: int, whole: int, cut: float, times: int) -> float:
        """Products of a layer with `weights` weights, `times` times: FLOPs at the rate of large ones, and beside that
        the reading and writing of `whole` rows of all columns and `cut` of this rank's, in model widths."""
        tensor = self.config.parallel.tensor
        moved = self.rows * (whole + cut / tensor) + self.width * weights / tensor
        flops = 2 * weights * self.config.data.token_budget * self.share
        return times * (flops / self.rate + moved / self.machine.bandwidth)

    def _ends(self, stage: int) -> float:
        """Embedding (whole on each tensor-parallel rank) and head, products in fp32."""
        model, parallel, flops = self.config.model, self.config.parallel, 0.0
        width, labels = model.hidden_size, model.label_channels * (1 if model.classes == 2 else model.classes)
        visual, text = self.pack.clips * self.pack.visual, self.pack.clips * self.pack.text
        if stage == 0:
            flops += 4 * width * (visual * labels * (model.classes == 2) + text * model.text_hidden_size)
        if stage == parallel.pipeline - 1:
            flops += 2 * BOTH * width * visual * labels / parallel.tensor
        return flops / parallel.context / self.fp32

    def _elementwise(self) -> float:
        """A layer's norms, residuals, rotation and SwiGLU: reads and writes of rows, backward twice as many, and
        what it takes to start kernels, of which small layers consist."""
        parallel, model = self.config.parallel, self.config.model
        between = self.rows / (parallel.tensor if self.split else 1)
        inside = self.rows / parallel.tensor
        inner = inside * model.ffn_hidden_size / model.hidden_size
        # two norms and two sums; norms, rotation and joining of heads; gate and up to their product
        moved = BOTH * (10 * between + 10 * inside + 3 * inner)
        launches = (BOTH + self.full) * KERNELS * self.machine.reached.kernel_latency
        return self.machine.elementwise * (moved / self.machine.bandwidth + launches)

    def _tensor(self) -> float:
        """Exposed: all-gather before and reduce-scatter after attention and MLP, and backward the gathering of their
        outputs' gradients; the other exchanges of backward run beside products (Korthikanti et al. 2022,
        arXiv:2205.05198, section 4.2.2, and megatron's asynchronous ones)."""
        ranks = self.config.parallel.tensor
        if ranks == 1:
            return 0.0
        count = 4 + 2 + (4 if self.full else 2 if self.again_mlp else 0)
        if not self.split:  # an all-reduce is both, and only those of forward are exposed
            count = 4 + (4 if self.full else 2 if self.again_mlp else 0)
        return count * self.machine.group(ranks, 1).all_gather(self.rows)

    def hidden_tensor(self, layers: int) -> float:
        """Beside the products of a backward pass."""
        ranks = self.config.parallel.tensor
        return layers * 4 * self.machine.group(ranks, 1).all_gather(self.rows)

    def _context(self) -> float:
        """Ulysses (arXiv:2309.14509, section 3.2): queries, keys and values one way, outputs the other, and back."""
        parallel = self.config.parallel
        group, size = self.machine.group(parallel.context, parallel.tensor), self.rows / parallel.tensor
        return (2 + self.again_attention) * (group.all_to_all(3 * size) + group.all_to_all(size))

    def _pipeline(self, stage: int) -> float:
        """Rows to the next stage and gradients back, and what comes from there, for each chunk."""
        parallel = self.config.parallel
        if parallel.pipeline == 1:
            return 0.0
        group = self.machine.group(parallel.pipeline, self.machine.gpus // parallel.pipeline)
        ends = 2 * parallel.virtual_pipeline - (stage == 0) - (stage == parallel.pipeline - 1)
        return ends * 2 * group.send(self.rows / (parallel.tensor if self.split else 1))

    def zero(self, weights: int, replicas: int, micro_batches: int, computing: float) -> tuple[float, float]:
        """(exposed, hidden) reduction of gradients and gathering of weights; volumes as in Rajbhandari et al. 2020
        (arXiv:1910.02054, section 7), gradients in fp32. ZeRO-1 reduces once and waits; ZeRO-2 and 3 reduce in every
        backward pass beside it, and ZeRO-3 gathers the weights for each pass."""
        if replicas == 1:
            return 0.0, 0.0
        stage, group = self.config.zero.stage, self.machine.group(replicas, self.config.parallel.tensor)
        gathering = group.all_gather(self.width * weights)
        if stage <= 1:
            return group.all_reduce(4 * weights) + (gathering if stage else 0.0), 0.0
        # DeepSpeed's ZeRO-2 reduces whole buckets on every rank (`allreduce_and_scatter`)
        reduction = group.all_reduce(4 * weights) if stage == 2 else group.reduce_scatter(4 * weights) + 2 * gathering
        beside = micro_batches * reduction
        room = computing * (2 / 3 if stage == 2 else 1.0)
        return max(0.0, beside - room) + (gathering if stage == 2 else 0.0), min(beside, room)

    def optimizer(self, weights: int, replicas: int) -> float:
        """Clipping and update."""
        zero, bandwidth = self.config.zero, self.machine.bandwidth
        own = weights / (replicas if zero.stage else 1)
        if zero.offload_optimizer:
            return own * ((4 + self.width) / self.machine.gpu.host + ADAMW_BYTES / self._host_rate())
        whole = weights * WHOLE_GRADIENT_BYTES if zero.stage <= 1 else 8 * own
        return (own * ADAMW_BYTES + whole) / bandwidth

    def _host_rate(self) -> float:
        """Bytes a second at which a process updates fp32 state in the host's memory, beside the others of its node."""
        reached = self.machine.reached
        return min(reached.host_process, reached.host_node / self.machine.gpus_per_node)

    def text_encoder(self, micro_batches: int) -> float:
        """Where it runs in training: captions are shared out among the ranks that read the same packs."""
        if self.config.text.states != "none":
            return 0.0
        layer = 4 * TEXT_ENCODER["width"] ** 2 + 3 * TEXT_ENCODER["width"] * TEXT_ENCODER["inner"]
        parallel = self.config.parallel
        texts = micro_batches * self.pack.clips * self.pack.text / (parallel.tensor * parallel.pipeline)
        weights = TEXT_ENCODER["layers"] * layer
        gathered = self.machine.group(self.machine.gpus_per_node, 1).all_gather(2 * weights)
        return 2 * weights * texts / self.machine.matmul + gathered

"""grn-scale plan --dense: the plan of a dense transformer that is not ours, from the figures that describe it.

    grn-scale plan --dense configs/planner/llama3_8b.yaml --gpu H100 --gpus-per-node 8 --nodes 8 --search
    grn-scale plan --dense FILE.yaml --gpu H100 --gpus-per-node 8 tp=4 recompute=full
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from grn_scale.errors import ConfigError
from grn_scale.planning.flops import Convention, attention_forward, counted
from grn_scale.planning.grn_budget import Assumed
from grn_scale.planning.grn_machine import GIB
from grn_scale.planning.hardware import find_gpu, load_efficiencies
from grn_scale.planning.layout import SHORT, Layout, Software, goes_into
from grn_scale.planning.memory import memory
from grn_scale.planning.shape import Shape
from grn_scale.planning.step_time import Machine, step_time
from grn_scale.tools.plan_document import NEAREST, throughput
from grn_scale.tools.plan_search import Ranked, rank

PARTS = {"matmul": "matrix products", "attention": "attention", "elementwise": "element-wise",
         "recompute": "recomputation", "tensor": "tensor", "context": "context", "bubble": "bubble",
         "imbalance": "fullest stage",
         "pipeline": "pipeline", "data": "ZeRO and data", "optimizer": "optimizer", "encoding": "encoding",
         "step": "fixed, of every step", "stragglers": "waiting"}
"""Field of `step_time.StepTime` -> what it is called."""
RECOMPUTE = ("none", "selective", "full")
CHANGES = ("tp", "sp", "pp", "vpp", "cp", "zero", "recompute", "micro_batch")
"""Fields that the search changes."""
MICRO_BATCHES = (1, 2, 4, 8)
ROUNDING = 1e-9
"""Seconds below which a part is the rounding of a difference."""


@dataclass(frozen=True)
class DenseRun:
    """A dense transformer and its layout; the figures without a sensible default must be given."""

    layers: int = 0
    hidden: int = 0
    heads: int = 0
    kv_heads: int = 0
    """0: as many as heads."""
    ffn: int = 0
    gated: bool = True
    vocab: int = 0
    """0: no embedding or head of note, as a diffusion transformer."""
    tied: bool = False
    causal: bool = True
    diffusion: bool = False
    """An image or video diffusion transformer: modulation in each layer, and the rates that such programs reach."""
    precision: str = "bf16"
    """bf16, or fp8 in the layers' matrix products."""
    seq_len: int = 0
    global_batch: int = 0
    """Sequences of a step."""
    tp: int = 1
    sp: bool = False
    """Without meaning where tp is 1."""
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ulysses: bool = False
    dp: int = 0
    """0: what the GPUs leave."""
    zero: int = 1
    fsdp: bool = False
    recompute: str = "none"
    micro_batch: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "ffn", "seq_len", "global_batch", "tp", "pp", "vpp", "cp",
                     "micro_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1: give it in the --dense "
                                  f"file or as {name}=N (configs/planner/llama3_8b.yaml is an example)")
        if self.precision not in ("bf16", "fp8"):
            raise ConfigError(f"precision is {self.precision!r}, but must be bf16 or fp8")
        for name in ("kv_heads", "vocab", "dp"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be 0 or more")

    @property
    def shape(self) -> Shape:
        return Shape(self.layers, self.hidden, self.heads, self.kv_heads or self.heads, self.ffn, self.gated,
                     self.vocab, self.tied, self.causal, self.seq_len)

    def layout(self, gpus: int) -> Layout:
        """The layout on so many GPUs; ConfigError where it breaks a rule."""
        model = self.tp * self.pp * self.cp
        if gpus % model:
            raise ConfigError(f"{gpus} GPUs do not divide by tp x pp x cp = {self.tp} x {self.pp} x {self.cp} = {model}"
                              ": take other degrees or --nodes")
        dp = gpus // model
        if self.dp not in (0, dp):
            raise ConfigError(f"dp is {self.dp}, but {gpus} GPUs over tp x pp x cp = {model} make {dp}: leave dp out, "
                              f"or take {self.dp * model} GPUs")
        shape = self.shape
        rules = (
            (shape.heads % self.tp == 0 and self.ffn % self.tp == 0,
             f"heads ({shape.heads}) and ffn ({self.ffn}) must be multiples of tp ({self.tp})"),
            (shape.kv_heads % self.tp == 0 or self.tp % shape.kv_heads == 0,
             f"kv_heads ({shape.kv_heads}) and tp ({self.tp}) must divide one by the other"),
            (goes_into(self.layers, self.pp * self.vpp),
             f"layers ({self.layers}) must be a multiple of pp x vpp ({self.pp} x {self.vpp}), or at most {SHORT} "
             "fewer: the first and last stage may have one less"),
            (self.vpp == 1 or self.pp > 1, f"vpp is {self.vpp}, but without a pipeline (pp=1) there is one chunk"),
            (self.zero >= 2 or not self.fsdp, f"fsdp=true shards gradients, too, but zero is {self.zero}: take zero=3"),
            (self.pp == 1 or self.zero < 2 or self.fsdp, f"zero={self.zero} does not go with pp={self.pp}: take zero=1"
             " or fsdp=true"),
            (not self.ulysses or shape.heads // self.tp % self.cp == 0,
             f"ulysses=true: heads / tp ({shape.heads // self.tp}) must be a multiple of cp ({self.cp})"),
            (self.seq_len % self.cp == 0, f"seq_len ({self.seq_len}) must be a multiple of cp ({self.cp})"),
            (self.global_batch % (dp * self.micro_batch) == 0,
             f"global_batch ({self.global_batch}) must be a multiple of dp x micro_batch ({dp} x {self.micro_batch}): "
             f"global_batch={max(1, round(self.global_batch / dp / self.micro_batch)) * dp * self.micro_batch} is the "
             "nearest that is"))
        for holds, message in rules:
            if not holds:
                raise ConfigError(message)
        found = Layout(tp=self.tp, sp=self.sp and self.tp > 1, pp=self.pp, vpp=self.vpp, cp=self.cp,
                       ulysses=self.ulysses, dp=dp, zero=self.zero, fsdp=self.fsdp, recompute=self.recompute,
                       micro_batch=self.micro_batch, global_batch=self.global_batch)
        if self.vpp > 1 and found.micro_batches % self.pp:
            raise ConfigError(f"vpp={self.vpp}: the {found.micro_batches} micro-batches of a replica must be a "
                              f"multiple of pp ({self.pp})")
        return found


@dataclass(frozen=True)
class DenseMachine:
    """Equal nodes with GPUs of one name."""

    machine: Machine
    nodes: int
    gpus_per_node: int
    software: Software

    @classmethod
    def find(cls, run: DenseRun, gpu: str, nodes: int, gpus_per_node: int, network: float | None) -> DenseMachine:
        """Arguments as of `find_machine`; ConfigError where nobody knows the GPU, or it has no fp8."""
        if gpu.endswith(".yaml"):
            raise ConfigError(f"--gpu {gpu}: measured rates are for plans of GRN; for --dense name a GPU, such as H100")
        sheet, reached = find_gpu(gpu).at_site(network, gpus_per_node), load_efficiencies()
        sheet.peak(run.precision == "fp8")
        newest = f"{sheet.architecture}_cudnn" in reached.attention
        return cls(Machine(sheet, reached), nodes, gpus_per_node, Software(
            attention="cudnn" if newest else "fa2", fp8=run.precision == "fp8", diffusion=run.diffusion))

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> int:
        return int(self.machine.gpu.memory_gib * GIB)

    @property
    def limit(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * self.machine.reached.filled)

    def assumed(self) -> list[str]:
        """What the rates are, in words."""
        gpu, software = self.machine.gpu, self.software
        kind = "fp8" if software.fp8 else "bf16"
        words = [f"{gpu.name} of {gpu.memory_gib:g} GiB, {gpu.peak(software.fp8) / 1e12:g} TFLOP/s in {kind}, "
                 f"{gpu.nic / 1e9:g} GB/s to other nodes; shares that are reached: configs/planner/*.yaml",
                 f"{software.attention} attention, fused kernels, overlapped communication, gradients in fp32, no "
                 "dropout"]
        if gpu.like:
            words.append(f"no run on {gpu.name} is published: those shares are what {gpu.like} reaches")
        if software.diffusion:
            words.append(f"products and attention take {self.machine.reached.diffusion:.2f} times as long as in "
                         "language models, as in the published image and video programs")
        return words


def stage_document(run: DenseRun, machine: DenseMachine) -> dict[str, Any]:
    """Bytes of the fullest rank by category and phase, as `plan_document.show_memory` takes them."""
    assumed, layout = Assumed(), run.layout(machine.gpus)
    held = memory(run.shape, layout, machine.software)
    sizes = {name: int(getattr(held, name)) for name in ("weights", "gradients", "optimizer", "gathered", "activations",
                                                         "running", "loss")}
    sizes["peak"] = int(held.total / (1 + machine.machine.reached.fragmentation))
    groups = (layout.tp, layout.pp, layout.cp, layout.shards, machine.gpus)
    beside = {"communication": assumed.communicator * sum(size > 1 for size in groups),
              "context": assumed.context + assumed.workspace,
              "fragmentation": int(held.reserved) - sizes["peak"]}
    at_rest = sizes["weights"] + sizes["optimizer"] + beside["context"]
    phases = {"load": at_rest, "step": sizes["peak"] + sum(beside.values()),
              "save": at_rest + sizes["gradients"] + beside["communication"]}
    return {"name": "fullest rank", "ranks": layout.gpus // layout.pp, "bytes": sizes, "beside": beside,
            "phases": phases, "host": {}}


def dense_document(run: DenseRun, machine: DenseMachine, tokens: float | None, price: float | None) -> dict[str, Any]:
    """Memory, verdict, step time and cost; ConfigError where the layout is illegal."""
    stage = stage_document(run, machine)
    most = max(stage["phases"].values())
    verdict: dict[str, Any] = {"fits": most <= machine.limit, "most_bytes": most, "limit_bytes": machine.limit,
                               "gpu_bytes": machine.memory, "nearest": [], "smallest": None}
    if not verdict["fits"]:
        verdict |= dense_remedies(run, machine)
    gpu = machine.machine.gpu
    return {"gpu": gpu.name, "nodes": machine.nodes, "gpus_per_node": machine.gpus_per_node, "gpus": machine.gpus,
            "parameters": int(run.shape.parameters), "layout": layout_text(run, machine.gpus), "verdict": verdict,
            "stages": [stage], "host_bytes_per_node": None, "time": _time(run, machine, tokens, price),
            "assumed": [*machine.assumed(),
                        "MFU counts causal attention half and takes the bf16 peak; Megatron and Llama 3 count it whole",
                        "gathered: weights of sharded layers while they are whole; running: what only the layer that "
                        "runs needs; loss and a layer do not run at the same time",
                        "memory is analytic: no dry run checks a model that is not ours (grn-scale plan validate "
                        "compares with published runs)"]}


def layout_text(run: DenseRun, gpus: int) -> str:
    layout = run.layout(gpus)
    vpp = f" VPP{run.vpp}" if run.vpp > 1 else ""
    return (f"DP{layout.dp} x TP{run.tp}{'+SP' if layout.sp else ''} x PP{run.pp}{vpp} x CP{run.cp}, "
            f"{'FSDP' if run.fsdp else 'ZeRO'}-{run.zero}, recompute {run.recompute}, micro-batch {run.micro_batch}")


def dense_ranked(run: DenseRun, machine: DenseMachine, tokens: float | None,
                 price: float | None) -> tuple[list[Ranked], int]:
    """As `plan_search.ranked`."""
    legal = list(legal_runs(run, machine))
    found = []
    for other in legal:
        most = max(stage_document(other, machine)["phases"].values())
        if most <= machine.limit:
            kinds = {"degrees": (other.tp, other.cp, other.pp, other.vpp), "ZeRO stage": (other.zero,),
                     "recomputation": (other.recompute,), "micro-batch": (other.micro_batch,)}
            found.append(Ranked(layout_text(other, machine.gpus), changed(run, other), distance(run, other), most,
                                _time(other, machine, tokens, price), kinds))
    return rank(found), len(legal)


def legal_runs(run: DenseRun, machine: DenseMachine) -> Iterator[DenseRun]:
    """Every legal layout of the model and batch on the machine, tensor parallelism inside NVLink's reach."""
    gpus, reach = machine.gpus, machine.machine.gpu.domain
    for tp in (d for d in _divisors(gpus) if d <= reach):
        for pp in (d for d in _divisors(gpus // tp) if goes_into(run.layers, d)):
            for cp in (d for d in _divisors(gpus // (tp * pp)) if d & (d - 1) == 0 and run.seq_len // d >= 1024):
                for vpp in ([1] if pp == 1 else [d for d in range(1, 9) if goes_into(run.layers, pp * d)]):
                    for zero in ((1,) if pp > 1 else (0, 1, 2, 3)):
                        for recompute in RECOMPUTE:
                            for micro in sorted({*MICRO_BATCHES, run.micro_batch}):
                                other = replace(run, tp=tp, sp=run.sp or tp > 1, pp=pp, vpp=vpp, cp=cp, dp=0, zero=zero,
                                                fsdp=run.fsdp and zero == 3, recompute=recompute, micro_batch=micro)
                                try:
                                    other.layout(gpus)
                                except ConfigError:  # most do not go together
                                    continue
                                yield other


def changed(before: DenseRun, after: DenseRun) -> tuple[str, ...]:
    """key=value of each field that differs."""
    names = [*CHANGES, *(["fsdp"] if before.fsdp != after.fsdp else []), *(["dp"] if before.dp else [])]
    return tuple(f"{name}={str(getattr(after, name)).lower()}" for name in names
                 if getattr(before, name) != getattr(after, name))


def distance(before: DenseRun, after: DenseRun) -> float:
    """Doublings of degrees and micro-batch, and steps of ZeRO and recomputation."""
    steps = sum(abs(math.log2(getattr(after, name) / getattr(before, name)))
                for name in ("tp", "pp", "vpp", "cp", "micro_batch"))
    again = [RECOMPUTE.index(each.recompute) if each.recompute in RECOMPUTE else 1 for each in (before, after)]
    return steps + abs(before.zero - after.zero) + abs(again[0] - again[1])


def dense_remedies(run: DenseRun, machine: DenseMachine) -> dict[str, Any]:
    """As `plan_document.remedies`."""
    found = [(changed(run, other), distance(run, other), max(stage_document(other, machine)["phases"].values()))
             for other in legal_runs(run, machine)]
    near = sorted((each for each in found if each[2] <= machine.limit), key=lambda each: (each[1], -each[2]))
    least = min(found, key=lambda each: each[2], default=None)
    return {"nearest": [{"settings": list(each[0]), "most_bytes": each[2]} for each in near[:NEAREST]],
            "smallest": least and {"settings": list(least[0]), "most_bytes": least[2]},
            "batch": "global_batch", "length": "seq_len"}


def _time(run: DenseRun, machine: DenseMachine, tokens: float | None, price: float | None) -> dict[str, Any]:
    shape, layout = run.shape, run.layout(machine.gpus)
    step = step_time(shape, layout, machine.software, machine.machine)
    model = counted(shape, Convention(halved=True))
    half = 0.5 if shape.causal else 1.0
    attention, products = half * attention_forward(shape), 2 * shape.layer_weights * shape.sequence
    again = {"none": 0.0, "selective": attention, "operators": products / 2, "full": attention + products}
    hardware = model + layout.recompute_share * shape.layers * again[run.recompute]
    peak = step.total * machine.machine.gpu.bf16 * machine.gpus / run.global_batch
    parts = {label: seconds for name, label in PARTS.items() if (seconds := getattr(step, name)) > ROUNDING}
    hidden = {"ZeRO and data": step.hidden} if step.hidden else {}
    return throughput(step.total, parts, hidden, run.global_batch * run.seq_len, machine.gpus, model / peak,
                      hardware / peak, tokens, price)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]

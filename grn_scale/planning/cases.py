"""Published runs as cases of the planner: what they state, and what is assumed where they do not.

Nothing is assumed in silence: each filled field is in `Case.assumed` with its value and reason. Settings that people
tune (micro-batch, recomputation, and the split where it is not stated) are taken as the fastest that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grn_scale.planning import case_text
from grn_scale.planning.case_file import UNREAD
from grn_scale.planning.case_gpu import case_gpu
from grn_scale.planning.case_layouts import CHUNK_LAYERS, layouts
from grn_scale.planning.flops import counted, read_convention
from grn_scale.planning.hardware import Efficiencies
from grn_scale.planning.layout import Layout, Software
from grn_scale.planning.memory import GIB, memory
from grn_scale.planning.shape import Shape, complete, gpt3_size
from grn_scale.planning.step_time import Machine, step_time

MEMORY_ERROR = 0.1
"""Share of a GPU's memory by which a split that ran may seem to be too large for it."""


class NotJudged(Exception):
    """A case that the model has no honest default for; the text says what is missing."""


@dataclass(frozen=True)
class Case:
    """A published run, complete."""

    name: str
    shape: Shape
    layout: Layout
    software: Software
    machine: Machine
    assumed: Mapping[str, str]
    """Field -> value and reason."""


def complete_case(case: Mapping[str, Any], reached: Efficiencies) -> Case:
    """The case with all it does not state filled in. Raises NotJudged where there is no honest default."""
    assumed: dict[str, str] = {}
    text = case_text.words(case)
    machine = _machine(case, reached, text, assumed)
    shape = _shape(case, text, assumed)
    case = _batch(_gpus(case, assumed), shape, machine, assumed)
    chosen, why = case_text.software(case, machine.gpu)
    assumed["software"] = why
    for field, reason in (("precision", case_text.precision(case)[1]), ("model", case_text.not_modelled(case))):
        if reason:
            assumed[field] = reason
    found = None
    for mixed in (False, True):
        for layout in layouts(case, shape, chosen, text, machine.gpu.memory_gib * GIB, mixed):
            held = memory(shape, layout, chosen).total
            over = max(0.0, held / (reached.filled * machine.gpu.memory_gib * GIB) - 1)
            seconds = step_time(shape, layout, chosen, machine).total / layout.global_batch
            if found is None or (over, seconds) < found[0]:
                found = (over, seconds), layout
        if found and found[0][0] <= MEMORY_ERROR:
            break  # it ran, so a simpler split is believed where it may have fit
    assert found is not None  # there is always one layout at least
    (over, _), layout = found
    _name_layout(case, layout, over, chosen.attention == "unfused", assumed)
    for field, reason in (case.get(UNREAD) or {}).items():
        assumed[field] = f"{assumed.get(field, 'not stated')}; in the file {reason}"
    return Case(case["name"], shape, layout, chosen, machine, assumed)


def _machine(case: Mapping[str, Any], reached: Efficiencies, text: str, assumed: dict[str, str]) -> Machine:
    gpu, why = case_gpu(case)
    if why:
        assumed["gpu"] = why
    gpu, watts, said = case_text.own_hardware(gpu, text)
    if said:
        assumed["hardware"] = f"{', '.join(said)}: from the notes"
    network = case["network_gbits"] / 8 * 1e9 if case.get("network_gbits") else None
    return Machine(gpu.at_site(network, case.get("gpus_per_node")), reached, watts)


def _gpus(case: Mapping[str, Any], assumed: dict[str, str]) -> Mapping[str, Any]:
    """The case with its number of GPUs, from the degrees where only those are stated."""
    if case.get("n_gpus") is not None:
        return case
    if case.get("dp") is None:
        raise NotJudged("number of GPUs not stated")
    context = case.get("cp") if isinstance(case.get("ulysses"), bool) else case.get("ulysses") or case.get("cp")
    gpus = case["dp"] * (case.get("tp") or 1) * (case.get("pp") or 1) * (context or 1)
    assumed["n_gpus"] = f"{gpus}: the product of the degrees"
    return {**case, "n_gpus": gpus}


def _batch(case: Mapping[str, Any], shape: Shape, machine: Machine, assumed: dict[str, str]) -> Mapping[str, Any]:
    """The case with the global batch that its published rate and seconds make, where it does not state one."""
    seconds = case.get("step_time_s")
    if case.get("global_batch") is not None or seconds is None:
        return case
    if case.get("tokens_per_s_per_gpu"):
        sequences = case["tokens_per_s_per_gpu"] / shape.sequence
    else:
        rate, share = case.get("measured_tflops_per_gpu"), case.get("mfu")
        convention, _ = read_convention(case.get("flops_convention"), rate is not None)
        if convention.hardware or not (rate or share):
            return case
        sequences = (rate * 1e12 if rate else share * case_text.peak(case, machine.gpu)) / counted(shape, convention)
    batch = max(1, round(sequences * seconds * case["n_gpus"]))
    assumed["global_batch"] = f"{batch}: what the published rate does in the published seconds"
    return {**case, "global_batch": batch}


def _shape(case: Mapping[str, Any], text: str, assumed: dict[str, str]) -> Shape:
    parameters = case["params_b"] * 1e9 if case.get("params_b") else None
    causal = case.get("causal")
    if causal is None:
        causal = True
        assumed["causal"] = "true: not stated, as language models are"
    layers, hidden = case.get("layers"), case.get("hidden")
    if (layers is None or hidden is None) and causal and parameters and (size := gpt3_size(parameters)):
        layers, hidden = size
        assumed["layers, hidden"] = f"{layers}, {hidden}: the GPT-3 model of that size (arXiv 2005.14165, table 2.1)"
    missing = [name for name, value in (("layers", layers), ("hidden", hidden), ("seq_len", case.get("seq_len")))
               if value is None]
    if missing:
        raise NotJudged(f"{', '.join(missing)} not stated")
    heads = case.get("heads")
    groups = case.get("kv_heads") or 1
    if heads is None:
        heads = max(1, round(hidden / 128 / groups)) * groups
        assumed["heads"] = f"{heads}: heads of 128"
    elif heads % groups:
        groups = math.gcd(heads, groups)
        assumed["kv_heads"] = f"{groups}: {case['kv_heads']} do not divide {heads} heads"
    vocab = case.get("vocab")
    if vocab is None:
        vocab = 51200 if causal else 0
        assumed["vocab"] = f"{vocab}: " + ("GPT-2's, padded, as Megatron takes it" if causal else
                                           "no token embedding, as in diffusion transformers")
    cross = "cross-attention" in text
    known = frozenset(name for name in ("ffn", "kv_heads") if case.get(name) is not None)
    shape = Shape(layers, hidden, heads, groups if case.get("kv_heads") else heads, case.get("ffn") or 4 * hidden,
                  False, vocab, False, causal, case["seq_len"], cross)
    shape, reasons = complete(shape, parameters, known)
    for name, reason in reasons.items():
        value = getattr(shape, name)
        assumed[name] = f"{value:.3g}: {reason}" if isinstance(value, float) else f"{value}: {reason}".lower()
    return shape


def _name_layout(case: Mapping[str, Any], layout: Layout, over: float, old: bool, assumed: dict[str, str]) -> None:
    """Enter what the layout has and the case does not state; old: the software is of before 2023."""
    tuned = "not stated: the fastest that fits"
    if over:
        tuned = f"not stated: what comes nearest to fitting ({over:.0%} too much)"
    reasons = {"tp": tuned, "pp": tuned, "cp": tuned, "micro_batch": tuned, "recompute": tuned,
               "vpp": f"not stated: chunks of {CHUNK_LAYERS} layers, or 1 where the software does not interleave",
               "dp": "GPUs over the other degrees", "sp": "not stated: with tensor parallelism since 2023"}
    if case.get("ulysses"):
        reasons.pop("cp")
    for name, reason in reasons.items():
        if case.get(name) is None:
            value = getattr(layout, name)
            if name == "recompute" and layout.recompute_share < 1:
                value = f"{value} in {layout.recompute_share:.0%} of the layers"
            assumed[name] = f"{str(value).lower() if isinstance(value, bool) else value}: {reason}"
    if layout.offload_optimizer:
        assumed["offload"] = "optimizer states and gradients on the CPU: it speaks of offloading with DeepSpeed"
    if layout.tiled:
        assumed["tiled"] = "loss and MLP piece by piece: it says so, or the loss alone would fill the GPU"
    if case.get("global_batch") is None:
        assumed["global_batch"] = (f"{layout.global_batch}: not stated: {layout.micro_batches} micro-batches for each "
                                   "data-parallel rank")
    zero, reason = case_text.zero_stage(case, old)
    if reason:
        assumed["zero_stage"] = f"{layout.zero}: {reason}" + (", which would not fit" if layout.zero != zero else "")
    if case.get("dp") not in (None, layout.dp):
        assumed["dp"] = f"{layout.dp}: {case['dp']} does not go with {case['n_gpus']} GPUs"
    if layout.gpus != case["n_gpus"]:
        assumed["n_gpus"] = f"{layout.gpus}: the degrees do not divide {case['n_gpus']} GPUs"

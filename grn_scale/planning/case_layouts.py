"""The layouts that agree with what a published run states about its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from grn_scale.planning import case_text
from grn_scale.planning.layout import Layout, Software, goes_into
from grn_scale.planning.memory import loss_bytes
from grn_scale.planning.shape import Shape

MICRO_BATCHES = (1, 2, 4, 8)
SHARES = (0.25, 0.5, 0.75)
"""Of the layers, how many recompute where it is not stated, beside none and all, with programs that let one choose."""
LONG_SEQUENCE = 16384
"""Tokens from which context parallelism is considered, and micro-batches of one sequence, where it is not stated."""
ONE_SEQUENCE = 262144
"""Tokens from which all GPUs are taken to share each sequence, where neither that nor the batch is stated."""
LARGE_LOSS = 0.8
"""Of a GPU's memory: a loss that would take more is taken for computed piece by piece."""
BATCH_TOKENS = 4e6
"""Of a step that may have a pipeline, where the batch is not stated: GPT-3's 3.2 and Llama 2's 4 million."""
CHUNK_LAYERS = 2
"""Of a chunk at least, where interleaving is not stated and stages divide so: MegaScale (arXiv 2402.15627) and
Megatron-Bridge's recipes. Else chunks have one layer, as Megatron-LM's 530B has (arXiv 2205.05198, table 3)."""


def _divisors(number: int, most: int) -> list[int]:
    return [each for each in range(1, min(number, most) + 1) if number % each == 0]


def layouts(case: Mapping[str, Any], shape: Shape, chosen: Software, text: str, most: float,
            mixed: bool) -> Iterator[Layout]:
    """All layouts that agree with what the case states; mixed: what is fully sharded may be split otherwise, too, and
    the optimizer be sharded where nothing says that it was not."""
    gpus = case["n_gpus"]
    text = re.sub(r"\b(no|not|without|w/o)( \w+)? offload\w*", "", text)
    offload = "offload" in text
    ulysses = bool(case.get("ulysses")) or "ulysses" in text
    fsdp = "fsdp" in case_text.sharding(case)
    zero, assumed = case_text.zero_stage(case, chosen.attention == "unfused")
    if mixed and assumed and zero == 0:
        zero = 1
    stated = case_text.recompute(case.get("recompute"))
    kinds = [stated] if stated else [("none", 1.0), ("full", 1.0)] + [("full", share) for share in SHARES if not fsdp]
    splits = list(_splits(case, shape, gpus, zero == 3 and not mixed))
    pipelined = any(pp > 1 for _, pp, _ in splits)
    for tp, pp, cp in splits:
        dp = max(1, gpus // (tp * pp * cp))
        vpp = case.get("vpp") or _chunks(shape, pp, zero == 3, text)
        sp = bool(tp > 1 and chosen.attention != "unfused") if case.get("sp") is None else bool(case["sp"])
        for micro, batch in _batches(case, dp, pp, zero == 3, pipelined, shape.sequence):
            for kind, share in kinds:
                layout = Layout(tp, sp, pp, vpp, cp, ulysses, dp, zero, fsdp, kind, share, micro, batch,
                                offload_optimizer=bool(re.search("optimizer (states )?offload", text))
                                or (offload and "deepspeed" in text),
                                offload_weights="weights + optimizer offload" in text,
                                offload_activations="activation offload" in text
                                or (kind == "full" and "offload of checkpoints" in text))
                yield replace(layout, tiled="all features" in text or loss_bytes(shape, layout) > LARGE_LOSS * most)


def _splits(case: Mapping[str, Any], shape: Shape, gpus: int, sharded: bool) -> Iterator[tuple[int, int, int]]:
    degree = case.get("ulysses")  # a number; true says that it is used, not how far
    context = degree if degree and not isinstance(degree, bool) else case.get("cp")
    # Full sharding stands in for tensor and pipeline parallelism: beside it they are stated, or dp leaves room.
    sharded = sharded and case.get("dp") in (None, gpus // (context or 1))
    tps = [case["tp"]] if case.get("tp") else [1] if sharded else [
        each for each in (1, 2, 4, 8) if shape.heads % each == 0]
    pps = [case["pp"]] if case.get("pp") else [1] if sharded else [
        each for each in range(1, 65) if goes_into(shape.layers, each)]
    cps = [context] if context else _divisors(gpus, 64) if shape.sequence >= LONG_SEQUENCE else [1]
    whole = [(tp, pp, cp) for tp, pp, cp in product(tps, pps, cps) if gpus % (tp * pp * cp) == 0]
    if not context and case.get("global_batch") is None and shape.sequence >= ONE_SEQUENCE:
        whole = [split for split in whole if math.prod(split) == max(map(math.prod, whole))]
    if case.get("dp"):
        exact = [split for split in whole if math.prod(split) * case["dp"] == gpus]
        whole = exact or whole
    else:
        busy = [split for split in whole if gpus // math.prod(split) <= (case.get("global_batch") or gpus)]
        whole = busy or whole
    yield from whole or [(tps[0], pps[0], cps[0])]


def _chunks(shape: Shape, pp: int, gathered: bool, text: str) -> int:
    """Chunks of a stage: 1 with programs that do not interleave by themselves (PyTorch's, DeepSpeed's)."""
    if pp == 1:
        return 1
    if gathered or re.search("deepspeed(?! integrated)", text):
        return 2 if "interleaved" in text else 1
    stage = math.ceil(shape.layers / pp)
    smallest = next((each for each in range(CHUNK_LAYERS, math.isqrt(stage) + 1) if stage % each == 0), 1)
    return stage // smallest  # chunks are of one size


def _batches(case: Mapping[str, Any], dp: int, pp: int, gathered: bool, pipelined: bool,
             sequence: int) -> Iterator[tuple[int, int]]:
    """Pairs of micro-batch and global batch; pipelined: there may be a pipeline, so that the batch is a large one."""
    micro, batch = case.get("micro_batch"), case.get("global_batch")
    if micro is None and batch is not None and pp > 1 and gathered:
        micro = max(1, batch // dp // pp)  # torchtitan cuts a rank's batch into as many as there are stages
    even = batch is None or batch % dp == 0  # else the batch is rounded in print, or the last one is not full
    most = max(1, int(BATCH_TOKENS / (sequence * dp)))  # without a batch, the larger of a usual one and one sequence
    tuned = [each for each in MICRO_BATCHES
             if (each <= most if batch is None else batch % (each * dp) == 0 if even else each * dp <= batch)]
    micros = [micro] if micro else tuned if sequence < LONG_SEQUENCE and tuned else [1]
    for each in micros:
        usual = round(BATCH_TOKENS / (sequence * each * dp)) if pipelined and not gathered else 1
        many = max(pp, usual)
        yield each, batch or each * dp * many

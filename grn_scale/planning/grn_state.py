"""Bytes that DeepSpeed and the engine keep of a rank's weights, gradients and optimizer, whatever the batch.

Which tensors a ZeRO stage divides is Rajbhandari et al. 2020 (arXiv:1910.02054), section 5; what DeepSpeed 0.19 really
holds differs from it, and this is what it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

from grn_scale.config.schema import Config
from grn_scale.planning.grn_parameters import Block

FP32 = 4
ALIGNMENT = 2
"""Elements that each rank's partition is a multiple of (`nccl_start_alignment_factor` of DeepSpeed's optimizers)."""
BUCKET = 50_000_000
"""Elements reduced at once with ZeRO-1 in fp32 and ZeRO-2 (`grn_scale.parallel.zero.BUCKET`)."""
PREFETCHED = 50_000_000
"""Elements that ZeRO-3 gathers ahead (DeepSpeed's `stage3_prefetch_bucket_size`)."""
FLATTENED = 500_000_000
"""Elements beyond which DeepSpeed begins another flat copy of gradients (its engine's `MEMORY_OPT_ALLREDUCE_SIZE`)."""


@dataclass(frozen=True)
class State:
    """Bytes of one rank between the passes of a step, by category, and what comes on top at its end."""

    weights: int
    optimizer: int
    average: int
    gradients: int
    """Held when the last backward pass is done."""
    gradients_first: int = 0
    """Of `gradients`, what is there before the first backward pass; the rest appears in it."""
    partition: int = 0
    """Elements of the weights, first ones first, whose gradients this rank keeps under ZeRO-2."""
    bucket_elements: int = 0
    """Elements reduced together under ZeRO-2 and, in fp32, ZeRO-1."""
    bucket: int = 0
    """Bytes of the buckets that gradients are reduced through, from the first gradient of a backward pass on."""
    bucket_stays: bool = False
    """Whether the buckets outlive the backward pass."""
    reduced: int = 0
    """Bytes an element of what leaves a bucket: its flat copy, and that in fp32."""
    cast: int = 0
    """Bytes an element of the copy of a gradient that is being added to the accumulated ones."""
    update: int = 0
    """Most bytes that reduction and update take beside what is held after the last backward pass."""
    assembled: int = 0
    """ZeRO-3: bytes of the weights that are whole at a time."""
    host: int = 0
    """Bytes of optimizer and average in host memory, where they are offloaded."""


def state(config: Config, blocks: Iterable[Block], replicas: int) -> State:
    """State of the first of `replicas` ranks that hold these weights. ZeRO-3 and offload are estimates: no dry run has
    been taken of them."""
    blocks = list(blocks)
    if config.zero.stage == 3:
        found = _divided_weights(config, blocks, replicas)
    else:
        found = _whole_weights(config, blocks, replicas)
    if config.zero.offload_optimizer:
        # gradients follow bucket by bucket
        found = replace(found, optimizer=0, average=0, gradients=0, gradients_first=0, update=0,
                        host=found.optimizer + found.average)
    return found


def _divided_weights(config: Config, blocks: list[Block], replicas: int) -> State:
    """ZeRO-3: vectors are whole everywhere, of matrices the block at work and what is gathered ahead."""
    width = 2 if config.train.precision == "bf16" else FP32
    moments = 2 * FP32 if config.optimizer.name == "adamw" else 0
    averaged = FP32 if config.optimizer.ema_decay > 0 else 0
    matrices, vectors = (sum(sum(getattr(block, name)) for block in blocks) for name in ("matrices", "vectors"))
    own = -(-(matrices + vectors) // replicas)
    bucket = min(max(BUCKET, *(count for block in blocks for count in block.matrices)), matrices)
    at_once = min(matrices, max(sum(block.matrices) for block in blocks) + PREFETCHED)
    return State(width * (-(-matrices // replicas) + vectors), (FP32 + moments) * own, averaged * own, FP32 * own,
                 FP32 * own, bucket_elements=bucket, bucket=width * bucket, reduced=FP32,
                 assembled=width * at_once)


def _whole_weights(config: Config, blocks: list[Block], replicas: int) -> State:
    groups = [[count for block in blocks for count in block.matrices],
              [count for block in blocks for count in block.vectors]]
    total, stage, bf16 = sum(map(sum, groups)), config.zero.stage, config.train.precision == "bf16"
    width = 2 if bf16 else FP32
    moments = 2 * FP32 if config.optimizer.name == "adamw" else 0
    averaged = FP32 if config.optimizer.ema_decay > 0 else 0
    if stage == 0:
        # fp32 only: the optimizer steps on the weights, gradients are flattened for their all-reduce
        return State(FP32 * total, moments * total, averaged * total, FP32 * total,
                     update=FP32 * _largest_flattened(count for block in blocks
                                                       for count in (*block.matrices, *block.vectors)))
    padded = [_round_up(sum(group), ALIGNMENT * replicas) for group in groups]
    parts = [group // replicas for group in padded]
    owned = sum(min(part, sum(group)) for part, group in zip(parts, groups))
    divided = (width * sum(padded), (FP32 + moments) * sum(parts), averaged * owned)
    if stage == 1 and bf16:
        # BF16_Optimizer accumulates whole gradients in fp32 from the start, one tensor for each group
        gradients = FP32 * sum(padded)
        return State(*divided, gradients, gradients, cast=FP32, update=FP32 * _largest_flattened(padded))
    bucket = _round_up(min(max(BUCKET, *map(max, groups)), total), 2)
    inside = [_overlapping(group, part) for group, part in zip(groups, parts)]
    if stage == 1:
        # gradients lie in .grad until the end; then those of this rank's partition are copied together, and under a
        # pipeline there is one more bucket
        more = bucket if config.parallel.pipeline > 1 else 0
        update = more + max(0, sum(inside) - _first_bucket(blocks, bucket))
        return State(*divided, FP32 * total, bucket_elements=bucket, bucket=FP32 * bucket, bucket_stays=True,
                     update=FP32 * update)
    # ZeRO-2: two buckets, because reduction overlaps with backward
    common = {"partition": parts[0], "bucket_elements": bucket, "bucket": 2 * width * bucket}
    if bf16:
        # the partition is one fp32 buffer; the norm takes a copy in fp64 of one tensor after the other
        largest = max(min(count, part) for group, part in zip(groups, parts) for count in group)
        return State(*divided, FP32 * sum(parts), **common, reduced=width + FP32, update=8 * largest)
    # whole tensors that reach into the partition, flattened for the update
    return State(*divided, FP32 * sum(inside), **common, reduced=FP32, update=FP32 * max(parts))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _largest_flattened(tensors: Iterable[int]) -> int:
    """Elements of the largest flat copy that gradients are all-reduced in: tensors are taken until there are more than
    FLATTENED; one alone needs no copy."""
    largest, taken = 0, []
    for count in tensors:
        taken.append(count)
        if len(taken) > 1:
            largest = max(largest, sum(taken))
        if sum(taken) > FLATTENED:
            taken = []
    return largest


def _overlapping(group: list[int], part: int) -> int:
    """Elements of the tensors of which a part lies in the group's first `part` elements."""
    return sum(count for count, before in zip(group, accumulate(group, initial=0)) if before < part)


def _first_bucket(blocks: list[Block], bucket: int) -> int:
    """Elements of the tensors that are reduced together first."""
    taken = 0
    for count in (count for block in blocks for count in (*block.matrices, *block.vectors)):
        if taken + count > bucket:
            break
        taken += count
    return taken

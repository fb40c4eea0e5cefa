"""Efficiencies fitted on published runs, and how well they predict sources that they were not fitted on.

The logarithms of a few efficiencies are moved by a damped Gauss-Newton method so that the logarithms of predicted over
published throughput become small. Large errors count in proportion to their size only (Huber 1964), and each efficiency
is held near to a starting value that was set by hand, so that one that few runs know stays credible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from grn_scale.errors import ConfigError
from grn_scale.planning.cases import Case, NotJudged, complete_case
from grn_scale.planning.hardware import Efficiencies, with_values
from grn_scale.planning.validate import throughput, throughput_field

START: dict[str, tuple[float, str]] = {
    "matmul.ampere_bf16": (0.80, "share of the peak that large matrix products reach"),
    "matmul.hopper_bf16": (0.70, "the same"),
    "matmul.hopper_fp8": (0.60, "the same, of the FP8 peak"),
    "matmul.blackwell_bf16": (0.68, "the same"),
    "attention.hopper_fa1": (0.19, "share of the bf16 peak that FlashAttention-1 reaches, both directions"),
    "elementwise_fused": (1.0, "passes over activations of fused kernels, relative to those counted"),
    "elementwise_eager": (2.0, "the same without a compiler or hand-written kernels"),
    "leak": (0.15, "of the shorter of computation and communication beside each other, the share that adds"),
    "leak_gradients": (0.1, "the same of the exchange of gradients and weights once a step"),
    "exposed_tensor": (0.35, "share of tensor and pipeline parallel communication that overlap leaves exposed"),
    "straggler": (0.01, "share of a step that is added for each doubling of the nodes"),
    "old_zero3": (0.12, "share of the network that DeepSpeed's ZeRO-3 of before 2023 reached"),
    "old_zero3_leak": (0.3, "leak of that"),
    "torch_ring": (1.5, "times that attention takes under PyTorch's own context parallelism"),
    "encoded_tokens": (10000.0, "tokens a second that a GPU encodes where videos are encoded in the loop"),
    "step_seconds": (0.05, "seconds of every step: reading data, norm of the gradient, logging"),
    "diffusion": (1.2, "times that products and attention of image and video diffusion programs take"),
}
"""What is fitted: where it starts (shares of a peak as those who tuned kernels report them, the rest by reason), and
what it is."""
HOLD = 0.3
"""Standard deviation of the logarithm of an efficiency around its start."""
NOISE = 0.08
"""Of the logarithm of a published figure around what a model of this kind can know."""
HUBER = 1.5
"""Errors beyond so many NOISE count in proportion only."""
ROUNDS = 8
STEP = 1e-3
LARGEST_STEP = 0.3
"""Of the logarithm, in one round."""


Judged = list[tuple[Mapping[str, Any], str, Case]]
"""Cases with the field that is judged and all that they do not state filled in."""


def judged(cases: Sequence[Mapping[str, Any]], reached: Efficiencies) -> Judged:
    """The cases that publish a throughput and can be judged."""
    found = []
    for case in cases:
        if field := throughput_field(case):
            with suppress(NotJudged, ConfigError):
                found.append((case, field, complete_case(case, reached)))
    return found


def errors(chosen: Judged, reached: Efficiencies) -> list[float]:
    """Of each case the logarithm of predicted over published throughput, as speed, with other efficiencies."""
    found = []
    for case, field, done in chosen:
        row = throughput(case, field, replace(done, machine=replace(done.machine, reached=reached)))
        found.append((-1 if field == "step_time_s" else 1) * float(np.log1p(row["error"])))
    return found


def fit(cases: Sequence[Mapping[str, Any]], reached: Efficiencies) -> dict[str, float]:
    """Name -> fitted value of what START names. In each round, what a case does not state is chosen anew."""
    names, start = list(START), np.log([start for start, _ in START.values()])
    point = start.copy()

    def at(where: np.ndarray) -> Efficiencies:
        return with_values(reached, dict(zip(names, np.exp(where), strict=True)))

    for _ in range(ROUNDS):
        chosen = judged(cases, at(point))
        here = np.array(errors(chosen, at(point))) / NOISE
        weight = np.sqrt(np.minimum(1.0, HUBER / np.maximum(np.abs(here), 1e-9)))
        slopes = np.empty((len(here), len(names)))
        for number in range(len(names)):
            moved = point.copy()
            moved[number] += STEP
            slopes[:, number] = (np.array(errors(chosen, at(moved))) / NOISE - here) / STEP
        rows = np.vstack([slopes * weight[:, None], np.eye(len(names)) / HOLD])
        right = np.concatenate([here * weight, (point - start) / HOLD])
        point = point - np.clip(np.linalg.lstsq(rows, right, rcond=None)[0], -LARGEST_STEP, LARGEST_STEP)
    return {name: float(value) for name, value in zip(names, np.exp(point), strict=True)}


def leave_one_source_out(cases: Sequence[Mapping[str, Any]], reached: Efficiencies) -> dict[str, list[float]]:
    """Source -> predicted / published - 1 of its cases, as speed, with efficiencies fitted on all other sources."""
    found = {}
    for source in dict.fromkeys(str(case.get("source")) for case in cases):
        mine = [case for case in cases if str(case.get("source")) == source]
        rest = [case for case in cases if str(case.get("source")) != source]
        values = with_values(reached, fit(rest, reached))
        if chosen := judged(mine, values):
            found[source] = [float(np.expm1(error)) for error in errors(chosen, values)]
    return found


def fitted_file(values: Mapping[str, float], names: Sequence[str]) -> str:
    """The text of configs/planner/fitted.yaml: fitted values, and the names of the cases that they were fitted on."""
    said = "# Written by `grn-scale plan validate --fit`: fitted on published runs. docs/planner.md says how."
    lines = [said, "values:", *(f"  {f'{name}: {value:.4f}':<32}# {START[name][1]}" for name, value in values.items())]
    return "\n".join([*lines, "fitted_on:", *(f"  - {name}" for name in names)]) + "\n"

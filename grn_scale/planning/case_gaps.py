"""What a field that a published run leaves out costs: those that state it are predicted again without it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grn_scale.planning.fitting import errors, judged
from grn_scale.planning.hardware import Efficiencies

_DEGREES = ("tp", "pp", "cp", "dp", "ulysses")
GAPS: Mapping[str, tuple[str, ...]] = {
    "nothing": (), "global batch": ("global_batch",), "micro-batch": ("micro_batch",), "DP": ("dp",),
    "TP, PP, CP and DP": _DEGREES, "recomputation": ("recompute",), "precision": ("precision",), "GPU": ("gpu",),
    "ffn and key-value heads": ("ffn", "kv_heads"), "vocabulary": ("vocab",),
    "ZeRO stage and sharding": ("zero_stage", "sharding"), "convention of FLOPs": ("flops_convention",),
    "notes": ("notes",), "batch, micro-batch and all degrees": ("global_batch", "micro_batch", *_DEGREES)}
"""Name -> fields that are taken away together."""


def errors_without(cases: Sequence[Mapping[str, Any]], reached: Efficiencies) -> dict[str, list[float]]:
    """Name of a gap -> predicted / published - 1, as speed, of the cases that state one of its fields."""
    found = {}
    for name, fields in GAPS.items():
        stating = [case for case in cases if not fields or any(case.get(field) is not None for field in fields)]
        chosen = judged([{**case, **dict.fromkeys(fields)} for case in stating], reached)
        found[name] = [math.expm1(error) for error in errors(chosen, reached)]
    return found

"""The accelerator of a published case: the one it names, one that it is like, or the usual one of its time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grn_scale.errors import ConfigError
from grn_scale.planning import case_text
from grn_scale.planning.hardware import Gpu, find_gpu, gpu_in, load_gpu, says_model

HOPPER = (2023, 1)
"""Since then the H100 is the usual GPU, before it the A100."""

FAMILIES = {"ampere": "A100-80GB", "hopper": "H100", "blackwell": "B200"}
"""The usual GPU of an architecture."""

ROUNDED = 0.03
"""Share by which a peak that is found from two rounded figures may be off."""


def case_gpu(case: Mapping[str, Any]) -> tuple[Gpu, str | None]:
    """The case's accelerator, and what is assumed about it: None where its name says all."""
    name = case.get("gpu")
    if name is None:
        return _told(case, "not stated")
    try:
        gpu = find_gpu(name)
    except ConfigError:
        if near := gpu_in(name):
            return near, f"{near.name}: {name!r} names no other that is known"
        return _told(case, f"{name!r} is not known")
    if gpu.like:
        return gpu, f"{gpu.name}: its data sheet, with the shares that are reached of {gpu.like}"
    return gpu, None if says_model(name, gpu) else f"{gpu.name}: {name!r} does not say which model"


def _told(case: Mapping[str, Any], why: str) -> tuple[Gpu, str]:
    """The GPU of the family that is named, or that the case's name has, or whose bf16 peak its TFLOP/s over its MFU
    is, 3 % more or less, or the usual one."""
    said = str(case.get("gpu")).lower()
    if family := next((name for word, name in FAMILIES.items() if word in said), None):
        return load_gpu(family), f"{family}: {case['gpu']!r} says its family only"
    if gpu := gpu_in(str(case.get("name"))):
        return gpu, f"{gpu.name}: {why}; the case's name has it"
    if case.get("mfu") and case.get("measured_tflops_per_gpu"):
        peak = case["measured_tflops_per_gpu"] / case["mfu"] * 1e12
        for gpu in map(load_gpu, ("A100-80GB", "H100", "B200", "GB200")):
            if abs(peak / gpu.bf16 - 1) < ROUNDED:
                return gpu, f"{gpu.name}: {why}; TFLOP/s over MFU is its peak"
    date = case_text.published_in(case)
    old = date is not None and date < HOPPER
    return load_gpu("A100-80GB" if old else "H100"), (f"{'A100-80GB' if old else 'H100'}: {why}; the usual one "
                                                      f"{'before' if old else 'since'} 2023")

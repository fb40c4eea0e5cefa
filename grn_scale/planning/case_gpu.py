"""The accelerator of a published case: a known one, one that only cases name, or the usual one of its time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

from grn_scale.config.load import read_mapping, shipped_file
from grn_scale.errors import ConfigError
from grn_scale.planning import case_text
from grn_scale.planning.hardware import Gpu, find_gpu, load_gpu

HOPPER = (2023, 1)
"""Since then the H100 is the usual GPU, before it the A100."""

ROUNDED = 0.03
"""Share by which a peak that is found from two rounded figures may be off."""


def case_gpu(case: Mapping[str, Any]) -> tuple[Gpu, str | None]:
    """The case's accelerator, and what is assumed about it: None where its name says all."""
    name = case.get("gpu")
    date = case_text.published_in(case)
    usual = "A100-80GB" if date is not None and date < HOPPER else "H100"
    when = f"the usual one {'before' if usual == 'A100-80GB' else 'since'} 2023"
    if name is None and (found := _told(case)):
        return found
    if name is None:
        return load_gpu(usual), f"{usual}: not stated; {when}"
    text = str(name).upper()
    for other, (gpu, like) in _others().items():
        if re.search(gpu.matches, text):
            return gpu, f"{other}: its data sheet, with the shares that are reached of {like}"
    try:
        gpu = find_gpu(text)
    except ConfigError:
        return load_gpu(usual), f"{usual}: {name!r} is not known; {when}"
    return gpu, None if gpu.name.upper() in text else f"{gpu.name}: {name!r} does not say which model"


def _told(case: Mapping[str, Any]) -> tuple[Gpu, str] | None:
    """The GPU that the case's name has, or whose bf16 peak its TFLOP/s over its MFU is, 3 % more or less."""
    with suppress(ConfigError):
        gpu = find_gpu(case["name"])
        return gpu, f"{gpu.name}: the name says it"
    if case.get("mfu") and case.get("measured_tflops_per_gpu"):
        peak = case["measured_tflops_per_gpu"] / case["mfu"] * 1e12
        for gpu in map(load_gpu, ("A100-80GB", "H100", "B200", "GB200")):
            if abs(peak / gpu.bf16 - 1) < ROUNDED:
                return gpu, f"{gpu.name}: TFLOP/s over MFU is its peak"
    return None


@cache
def _others() -> dict[str, tuple[Gpu, str]]:
    """Name -> accelerator of configs/planner/other_gpus.yaml, and the known one that it is taken to be like."""
    found = {}
    for name, values in read_mapping(shipped_file("planner/other_gpus.yaml"), "accelerators").items():
        changed = dict(values)
        like = changed.pop("like")
        found[name] = replace(load_gpu(like), name=name, **changed), like
    return found

"""GPUs and their links from configs/hardware/, and what is reached of them from configs/planner/efficiencies.yaml."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from grn_scale.config.load import read_mapping, shipped_file
from grn_scale.errors import ConfigError

NAMES = ("A100-40GB", "A100-80GB", "A100-PCIe", "B200", "GB200", "H100", "H100-PCIe", "H200", "H800", "L40S")
"""Files of configs/hardware/."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it. Rates are a second; links are one direction, of one GPU."""

    name: str
    matches: str
    """Pattern of the names under which it is known."""
    architecture: str
    memory_gib: float
    bandwidth: float
    bf16: float
    fp8: float | None
    watts: float
    nvlink: float
    domain: int
    """GPUs that reach each other over `nvlink`, which is PCIe where there is no NVLink."""
    nic: float
    host: float

    def peak(self, fp8: bool) -> float:
        """Dense FLOP/s; ConfigError where it has no FP8."""
        if not fp8:
            return self.bf16
        if self.fp8 is None:
            raise ConfigError(f"{self.name} has no FP8 tensor cores: take bf16, or a GPU of Hopper or later")
        return self.fp8


@dataclass(frozen=True)
class Efficiencies:
    """Shares of the data sheet that are reached, seconds and factors: see the comments of efficiencies.yaml."""

    matmul: Mapping[str, float]
    attention: Mapping[str, tuple[float, float]]
    bandwidth: float
    nvlink: float
    nic: float
    nvlink_latency: float
    nic_latency: float
    kernel_latency: float
    unfused_attention: float
    short_attention: float
    narrow_heads: float
    tree: float
    fragmentation: float
    operators_kept: float
    filled: float
    host_process: float
    host_node: float
    elementwise_fused: float
    elementwise_eager: float
    leak: float
    leak_gradients: float
    exposed_tensor: float
    straggler: float
    old_zero3: float
    old_zero3_leak: float
    torch_ring: float
    encoded_tokens: float
    step_seconds: float
    diffusion: float


@cache
def load_gpu(name: str) -> Gpu:
    """The GPU of configs/hardware/NAME.yaml. ConfigError where the file does not hold what a GPU has."""
    file = shipped_file(f"hardware/{name}.yaml")
    return Gpu(name=name, **_checked(read_mapping(file, "hardware"), file, [f.name for f in fields(Gpu)][1:]))


@cache
def load_efficiencies() -> Efficiencies:
    """The shipped efficiencies: efficiencies.yaml, and fitted.yaml over it. ConfigError where one is missing."""
    file = shipped_file("planner/efficiencies.yaml")
    fitted = read_mapping(shipped_file("planner/fitted.yaml"), "efficiencies")["values"]
    plain = {name: value for name, value in fitted.items() if "." not in name}
    values = _checked(read_mapping(file, "efficiencies") | plain, file, [f.name for f in fields(Efficiencies)])
    values["attention"] = {name: tuple(pair) for name, pair in values["attention"].items()}
    return with_values(Efficiencies(**values), fitted)


def with_values(reached: Efficiencies, values: Mapping[str, float]) -> Efficiencies:
    """The efficiencies with those of the dotted names replaced; of an attention kernel, both directions."""
    tables: dict[str, Any] = {"matmul": dict(reached.matmul), "attention": dict(reached.attention)}
    plain = {}
    for name, value in values.items():
        table, _, key = name.rpartition(".")
        if table == "attention":
            tables[table][key] = (value, value)
        elif table:
            tables[table][key] = value
        else:
            plain[name] = value
    return replace(reached, **tables, **plain)


def find_gpu(text: str) -> Gpu:
    """The GPU that a free text names, such as "NVIDIA H100 80GB HBM3" or "A100 (SXM)": of several, the one whose
    pattern takes most of it. ConfigError naming the nearest known ones otherwise."""
    upper = text.upper()
    found = [(len(match.group()), name) for name in NAMES if (match := re.search(load_gpu(name).matches, upper))]
    if not found:
        near = difflib.get_close_matches(upper, NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}"
        raise ConfigError(f"unknown GPU {text!r}: {hint}; to plan for another one, take the known one that is nearest "
                          "to it")
    return load_gpu(max(found)[1])


def _checked(values: dict[str, Any], file: object, names: Iterable[str]) -> dict[str, Any]:
    names = set(names)
    if missing := names - set(values):
        raise ConfigError(f"{file} has no {', '.join(sorted(missing))}")
    if unknown := set(values) - names:
        raise ConfigError(f"{file}: unknown key {', '.join(sorted(unknown))}")
    return values

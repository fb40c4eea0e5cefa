"""GPUs and their links from configs/hardware/, and what is reached of them from configs/planner/efficiencies.yaml."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from grn_scale.config.load import read_mapping, shipped_file
from grn_scale.errors import ConfigError

NAMES = ("A100-40GB", "A100-80GB", "A100-PCIe", "B200", "GB200", "H100", "H100-PCIe", "H200", "H800", "L40S")
"""Files of configs/hardware/ with all that is known of a GPU; others.yaml has what differs of others."""
_SAYS_NOTHING = re.compile(r"NVIDIA|AMD|INSTINCT|GEFORCE|TESLA|GOOGLE|CLOUD|INTEL|HABANA|GPUS?|TENSOR|CORE|[DH]GX|"
                           r"SXM\d?|HBM\d?E?|AMPERE|HOPPER|BLACKWELL|\d+X|X\d+")
"""Words of a GPU's name that tell no model: makers, modules, kinds of memory, counts."""

BOARD, MOST_IN_A_NODE = 8, 16
"""GPUs of a usual board, which sites have with fewer or more, and of one at most: a smaller NVLink domain is a bridge
between cards, a larger one spans nodes."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet has it. Rates are a second; links are one direction, of one GPU."""

    name: str
    names: tuple[str, ...]
    """Under which it is known, without words that tell no model; empty: it was measured, and no data sheet is known."""
    architecture: str
    memory_gib: float
    bandwidth: float
    bf16: float
    fp8: float | None
    fp32: float
    """Outside the tensor cores."""
    watts: float
    nvlink: float
    domain: int
    """GPUs that reach each other over `nvlink`, which is PCIe where there is no NVLink."""
    nic: float
    host: float
    like: str = ""
    """The GPU whose shares of the data sheet it is assumed to reach; empty: itself."""

    def peak(self, fp8: bool) -> float:
        """Dense FLOP/s; ConfigError where it has no FP8."""
        if not fp8:
            return self.bf16
        if self.fp8 is None:
            raise ConfigError(f"{self.name} has no FP8 tensor cores: take bf16, or a GPU of Hopper or later")
        return self.fp8

    def at_site(self, network: float | None, gpus_per_node: int | None) -> Gpu:
        """With a site's bytes a second to other nodes, and its GPUs of a node; None: what is usual for it. An NVLink
        domain that spans nodes (NVL72) stays."""
        inside = self.domain
        if gpus_per_node and inside <= MOST_IN_A_NODE:
            inside = gpus_per_node if inside >= BOARD else min(inside, gpus_per_node)
        return replace(self, nic=network or self.nic, domain=inside)


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
    wanted = {f.name for f in fields(Gpu)} - {"name", "like"}
    values = _checked(read_mapping(file, "hardware"), file, wanted)
    return Gpu(name=name, **{**values, "names": tuple(values["names"])})


@cache
def known_gpus() -> tuple[Gpu, ...]:
    """All GPUs that are known: those with a file of their own, then those of others.yaml."""
    own = {name: load_gpu(name) for name in NAMES}
    others = read_mapping(shipped_file("hardware/others.yaml"), "hardware")
    return (*own.values(), *(replace(own[values["like"]], name=name, **{**values, "names": tuple(values["names"])})
                             for name, values in others.items()))


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
    """The GPU that a text names as a whole, such as "NVIDIA H100 80GB HBM3" or "A100 (40GB)". ConfigError naming the
    nearest known ones where there is none: a variant that is not known is another GPU."""
    words = _words(text)
    for gpu in known_gpus():
        if any(set(name.split()) == words for name in gpu.names):
            return gpu
    near = [gpu.name for gpu in known_gpus() if any(name.split()[0] in words for name in gpu.names)]
    near = near or difflib.get_close_matches(text.upper(), [gpu.name for gpu in known_gpus()], n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(gpu.name for gpu in known_gpus())}"
    raise ConfigError(f"unknown GPU {text!r}: {hint}; to plan for another one, take the known one that is nearest to "
                      "it, or a file that `grn-scale bench gpu --hardware FILE.yaml` measured")


def gpu_in(text: str) -> Gpu | None:
    """The GPU of which a text has the most words among others; None where it names none."""
    words = _words(text)
    found = [(len(name.split()), gpu) for gpu in known_gpus() for name in gpu.names if set(name.split()) <= words]
    return max(found, key=lambda each: each[0])[1] if found else None


def says_model(text: str, gpu: Gpu) -> bool:
    """Whether a text has all words of a GPU's own name."""
    return _words(gpu.name) <= _words(text)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that its driver gives, or None where it is not known."""
    with suppress(ConfigError):
        return find_gpu(device_name).bf16
    return None


def _words(text: str) -> frozenset[str]:
    """Words of a GPU's name that tell its model, in capitals, without how many there are; sizes as 80GB."""
    plain = re.sub(r"(\d+) ?G(I?B)?\b", r"\1GB", text.upper().replace("-", " ").replace("_", " "))
    plain = re.sub(r"^ *\d+ ?[X*\u00d7]? *(?=[A-Z])|(?<=\d) ?[X*\u00d7] ?\d+\b", "", plain)
    return frozenset(part for word in re.findall(r"[A-Z0-9]+", plain) if not _SAYS_NOTHING.fullmatch(word)
                     for part in _known_parts(word))


def _known_parts(word: str) -> Iterable[str]:
    """The word; or where no name has it, without a plural's s, or cut where figures begin, if names have those."""
    known = _name_words()
    if word not in known and word[:-1] in known and word[-1] == "S":
        return [word[:-1]]
    cut = re.fullmatch(r"([A-Z]+?)(V?\d\w*)", word)
    return cut.groups() if word not in known and cut and known.issuperset(cut.groups()) else [word]


@cache
def _name_words() -> frozenset[str]:
    return frozenset(word for gpu in known_gpus() for name in gpu.names for word in name.split())


def _checked(values: dict[str, Any], file: object, names: Iterable[str]) -> dict[str, Any]:
    names = set(names)
    if missing := names - set(values):
        raise ConfigError(f"{file} has no {', '.join(sorted(missing))}")
    if unknown := set(values) - names:
        raise ConfigError(f"{file}: unknown key {', '.join(sorted(unknown))}")
    return values

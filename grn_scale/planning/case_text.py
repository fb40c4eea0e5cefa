"""What the words of a published case tell beside its numbers: hardware of its own, software, recomputation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from grn_scale.planning.hardware import Gpu
from grn_scale.planning.layout import Software

FLASH = (2023, 1)
"""Runs published half a year after FlashAttention (arXiv 2205.14135) and sequence parallelism (arXiv 2205.05198), and
later, may have had them: those before were made with older programs."""
FLASH2 = (2023, 8)
"""After FlashAttention-2 (arXiv 2307.08691)."""
HOPPER_FLASH = (2024, 7)
"""After FlashAttention-3 (arXiv 2407.08608) and cuDNN's kernels for Hopper."""
HIDING = (2024, 3)
"""Since Megatron-core 0.6, tensor and data parallel communication runs beside computation unless switched off; with
Transformer Engine, and so on Hopper, it did before."""


_NOT = re.compile(r"(none|no|not|off|false|disabled?|without)\b|0$")
"""How a text begins that says that nothing is recomputed."""


def words(case: Mapping[str, Any]) -> str:
    """All free text of a case, in small letters."""
    return " ".join(str(case.get(field) or "") for field in ("source", "name", "notes", "sharding", "precision",
                                                              "recompute")).lower()


def precision(case: Mapping[str, Any]) -> tuple[str, str | None]:
    """The precision in small letters, and what is assumed: FP8 where only the name says so, bf16 where nothing does and
    for what the model does not have."""
    stated = _fp8(str(case.get("precision") or ""))
    if not stated:
        named = "fp8" in _fp8(str(case.get("name")))
        return ("fp8", "fp8: the name says it") if named else ("", "bf16: not stated")
    if "fp4" in stated:
        return stated, f"fp8: the model has no {stated!r}"
    if re.match("fp32|tf32|float32", stated):
        return stated, f"bf16: the model has no {stated!r}"
    return stated, None


def _fp8(text: str) -> str:
    """In small letters, all names of FP8 as "fp8", and none where it says that there is none."""
    plain = re.sub(r"\b(no|not|without|w/o|non)[- ](fp8|float8)\w*", "", text.lower())
    return re.sub("float8|f8e4m3|e4m3|e5m2|8-bit float\\w*", "fp8", plain)


def sharding(case: Mapping[str, Any]) -> str:
    """The sharding in small letters, ZeRO's stages as "zero-3" and all names of FSDP as "fsdp": where neither it nor
    the stage is stated, what name and program (torchtitan and llm-foundry shard by FSDP) tell."""
    if case.get("sharding") or case.get("zero_stage") is not None:
        plain = re.sub(r"\b(no|not|without|w/o|non)[- ](fsdp|zero\S*)", "ddp", str(case.get("sharding") or "").lower())
        plain = re.sub(r"zero[- _]?(?:stage[- _]?)?([0-3])", r"zero-\1", plain)
        return re.sub(r"\bhsdp|fully[- ]sharded(?: data[- ]parallel(?:ism)?)?", "fsdp", plain)
    said = f"{case.get('name')} {case.get('source')}".lower()
    if any(word in said for word in ("fsdp", "torchtitan", "llm-foundry")):
        return "fsdp"
    return "zero-3" if re.search("zero-?3", str(case.get("name")).lower()) else ""


def zero_stage(case: Mapping[str, Any], old: bool) -> tuple[int, str | None]:
    """The ZeRO stage, and the reason where no field states it."""
    if case.get("zero_stage") is not None:
        return case["zero_stage"], None
    said = sharding(case)
    if match := re.search("zero-([0-3])", said):
        return int(match[1]), f"the sharding is {said!r}"
    if "shard_grad_op" in said:
        return 2, "SHARD_GRAD_OP keeps the weights"
    if "fsdp" in said:
        return 3, "FSDP shards everything"
    if re.search(r"\bddp\b", said) and "distributed optimizer" not in said and "megatron" not in words(case):
        return 0, f"the sharding is {said!r}"
    return (0, "not stated: no ZeRO before 2023") if old else (1, "not stated: a distributed optimizer since 2023")


def peak(case: Mapping[str, Any], gpu: Gpu) -> float:
    """FLOP/s that the case's MFU is of: the bf16 peak, or FP8's where its words say so."""
    said = _fp8(f"{case.get('notes')} {case.get('flops_convention')}")
    return gpu.peak(gpu.fp8 is not None and re.search(r"fp8( \w+)? peak|peak (of|in) fp8", said) is not None)


def not_modelled(case: Mapping[str, Any]) -> str | None:
    """What the case's words say that the model does not have and predicts as dense."""
    text = words(case)
    found = [name for name, pattern in (
        ("a mixture of experts", r"\bmoe\b|mixture[- ]of[- ]experts|\bexperts?\b|\ba\d+(\.\d+)?b\b"),
        ("attention in windows", r"sliding[- ]window|window(ed)? attention|local attention|neighborhood attention")) if
        re.search(pattern, text)]
    return f"dense: {' and '.join(found)} is not modelled" if found else None


def published_in(case: Mapping[str, Any]) -> tuple[int, int] | None:
    """Year and month of the earliest arXiv number in the source's own title, or the middle of a year before 2023 that
    it names; None where it has neither."""
    source = str(case.get("source")).lower()
    numbers = [(2000 + int(year), int(month)) for year, month in re.findall(r"arxiv[: ](\d\d)(\d\d)\.\d{4,5}", source)]
    return min(numbers or [(int(year), 6) for year in re.findall(r"\b(20(?:1\d|2[0-2]))\b", source)], default=None)


def own_hardware(gpu: Gpu, text: str) -> tuple[Gpu, float | None, list[str]]:
    """The GPU with memory, bandwidth and power limit that the words state, the limit in watts, and what was read."""
    said = []
    if match := re.search(r"hbm\w*\W{0,3}(\d+(?:\.\d+)?) ?tb/s", text):
        gpu = replace(gpu, bandwidth=float(match[1]) * 1e12)
        said.append(f"bandwidth {match[1]} TB/s")
    match = re.search(r"\b(\d{2,3}) ?gb hbm", text)
    share = float(match[1]) / gpu.memory_gib if match else 1.0
    if match and 1.05 < max(share, 1 / share) < 2:  # not what the data sheet has already, nor that of a node
        gpu = replace(gpu, memory_gib=float(match[1]))
        said.append(f"memory {match[1]} GB")
    watts = None
    if match := re.search(r"(\d{3,4}) ?w power limit", text):
        watts = float(match[1])
        said.append(f"power limit {match[1]} W")
    return gpu, watts, said


def software(case: Mapping[str, Any], gpu: Gpu) -> tuple[Software, str]:
    """The software that a case's words, precision and date let one assume, and why."""
    text, date, number = words(case), published_in(case), precision(case)[0]
    old = (date is not None and date < FLASH) or "no flash" in text or number.startswith("fp16")
    old = old and gpu.architecture == "ampere"
    sharded = sharding(case)
    zero3 = zero_stage(case, old)[0] == 3
    flat = "fsdp" in sharded  # gathers the weights of whole layers, where DeepSpeed gathered tensor by tensor
    if old:
        return Software("unfused", overlap=False, fused=True, old_zero3=zero3 and not flat, dropout=True,
                        gradient_bytes=2), "of before 2023: no fused attention, communication exposed, dropout"
    if gpu.architecture == "ampere":
        kernel = "fa1" if "pre-fa3" in text or (date and date < FLASH2 and "flashattention-2" not in text) else "fa2"
    elif gpu.architecture == "hopper":
        torch_kernels = "fsdp" in sharded and "megatron" not in sharded and "te kernels" not in text
        early = (date and date < HOPPER_FLASH) or "flashattention-2" in text or torch_kernels
        kernel = "fa1" if "pre-fa3" in text else "fa2" if early else "cudnn"
    else:
        kernel = "cudnn" if gpu.architecture == "blackwell" else "fa2"
    own = f"{case.get('name')} {case.get('notes')} {number} {sharded}".lower()
    torch = "fsdp2" in text and "te kernels" not in text
    if torch:  # PyTorch hides tensor parallel communication with asynchronous tensor parallelism only
        overlap = "async" in own
    else:
        overlap = "overlap" in text or date is None or date >= HIDING or gpu.architecture != "ampere"
    eager = ("fsdp" in text or sharded == "fsdp") and not re.search("compile|asynctp|te kernels|fp8|megatron", own)
    wanted = "fp8" in number or "fp4" in number
    fp8 = wanted and gpu.fp8 is not None
    diffusion = case.get("causal") is False and not re.search(r"\b(bert|encoder|vit|masked language|mlm)\b", text)
    chosen = Software(kernel, fp8, not eager, overlap, diffusion=diffusion, torch_ring=torch,
                      encodes="videos/s" in str(case.get("value_origin")),
                      gradient_bytes=2 if "deepspeed" in text or (fp8 and not zero3) else 4)
    return chosen, (f"{kernel} attention, {'eager' if eager else 'fused'} elementwise kernels, communication "
                    f"{'overlapped' if overlap else 'exposed'}"
                    + ("; a diffusion program, since attention is not causal" if diffusion else "")
                    + (f"; bf16: {gpu.name} has no FP8" if wanted and not fp8 else ""))


def recompute(text: str | None) -> tuple[str, float] | None:
    """Kind and share of the layers that a case's `recompute` says; None where it says nothing."""
    low = (text or "").lower().strip()
    if not low:
        return None
    if _NOT.match(low):
        return "none", 1.0
    if match := re.search(r"(\d+(?:\.\d+)?) ?%", low):
        return "full", float(match[1]) / 100
    if (match := re.search(r"(\d+) (?:of|out of|/) (?:the )?(\d+)", low)) and 0 < int(match[1]) <= int(match[2]):
        return "full", int(match[1]) / int(match[2])
    if re.search("every (other|second)", low):
        return "full", 0.5
    if "per-op" in low or re.fullmatch("mlp|moe_act|mlp, core_attn|core_attn, mlp", low):
        return "operators", 1.0
    if "norm" in low:
        return "none", 1.0
    if re.search(r"selective|core[_ ]?att|attention (core|only)|only attention|flash", low):
        return "selective", 1.0
    return ("full", 1.0) if re.search("full|true|yes|all|on|check|block|layer|uniform|recomp|activation", low) else None

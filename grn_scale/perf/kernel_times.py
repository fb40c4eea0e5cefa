"""What a recorded step spent its time on, by kind of kernel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "communication": r"nccl|gloo|c10d|all_reduce|allgather|reduce_scatter",
    "update": r"adam|lerp|clip_grad|l2norm|linalg_vector_norm",
    "matrix products": r"gemm|gemv|nvjet|xmma|cutlass|cublas|\bmm\b|addmm|bmm|::linear|mkldnn|onednn",
    "compiled chains": r"triton|inductor",
    "copies": r"memcpy|memset|copy_|\bcat\b|CatArray|index|fill_|zero_",
}
"""Kind -> pattern in the names of its kernels; the first that fits counts, the rest is element-wise."""
OTHER = "element-wise"
LISTED = 15


def kernel_times(recorded: torch.profiler.profile, device: torch.device, seconds: float) -> dict[str, Any]:
    """Shares of a step of `seconds`: by kind, of the longest kernels, and of the time in which the device was idle.

    On a GPU kernels are counted, on a CPU operations without those that they call.
    """
    from torch.autograd import DeviceType

    rows = []
    for event in recorded.key_averages():
        if device.type == "cuda":
            # a range that somebody marked spans kernels which are there by themselves
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                rows.append((event.key, event.self_device_time_total * 1e-6, event.count))
        elif event.device_type == DeviceType.CPU:
            rows.append((event.key, event.self_cpu_time_total * 1e-6, event.count))
    kinds = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, spent, _ in rows:
        kinds[kind(name)] += spent
    busy = sum(kinds.values())
    longest = sorted(rows, key=lambda row: -row[1])[:LISTED]
    return {"seconds": _rounded(seconds),
            "shares": {name: _rounded(spent / seconds) for name, spent in kinds.items()},
            "idle": _rounded(max(0.0, 1 - busy / seconds)) if device.type == "cuda" else None,
            "longest": [{"name": name, "kind": kind(name), "share": _rounded(spent / seconds), "calls": count}
                        for name, spent, count in longest]}


def kind(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")

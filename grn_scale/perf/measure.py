"""What the benchmarks share: repeats and their spread, peak memory, the machine and versions, the synthetic sample."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.config.data_schema import TokenizeConfig

if TYPE_CHECKING:
    import torch

PACKAGES = ("grn-scale", "torch", "megatron-core", "deepspeed", "numpy", "av")
CAPTION_TOKENS = 9
"""Text tokens of a synthetic sample."""


def repeat(work: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, after `warmup` calls that do not count. `work` waits for its own device."""
    seconds = []
    for number in range(warmup + repeats):
        begin = time.perf_counter()
        work()
        if number >= warmup:
            seconds.append(time.perf_counter() - begin)
    return seconds


def paired(works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each of `repeats` calls of every one, in turn and each time the other way round, so that what else the
    machine does falls on all alike; after one call of each that does not count."""
    seconds: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    for number in range(repeats + 1):
        for which in order:
            found = repeat(works[which], 1, warmup=0)
            if number:
                seconds[which] += found
        order.reverse()
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of the repeats, and how many there are; four digits, no more is known."""
    rounded = {name: float(f"{function(values):.4g}")
               for name, function in (("median", statistics.median), ("min", min), ("max", max))}
    return {**rounded, "repeats": len(values)}


def rates(amount: float, seconds: Sequence[float]) -> dict[str, float]:
    """Spread of `amount` a second over the repeats."""
    return spread([amount / second for second in seconds])


def peak_memory() -> dict[str, int]:
    """Most bytes held so far: resident memory of this process, of its largest finished child, and on the GPU."""
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
            "largest_child_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit}
    import torch

    if torch.cuda.is_available():
        peak["cuda_bytes"] = torch.cuda.max_memory_allocated()
    return peak


def surroundings() -> dict[str, Any]:
    """Hardware, versions and date of a measurement, as plain values."""
    import torch

    hardware = {"cpu": _cpu_field("model name"), "cpu_flags": _cpu_flags(), "cores": len(os.sched_getaffinity(0)),
                "machine": platform.machine(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
    versions = {"python": platform.python_version(), "system": platform.platform(), "cuda": torch.version.cuda,
                "nccl": _nccl_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"hardware": hardware, "versions": versions, "date": date}


def _nccl_version() -> str | None:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else None


def start_torch(threads: int) -> torch.device:
    """This process's device, after giving torch `threads` CPU threads (0: the cores divided by the processes)."""
    import torch

    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, cores))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Return when the device has done all it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def latent_shape(settings: TokenizeConfig) -> tuple[tuple[int, int, int], float]:
    """Latent frames, height and width of a square clip of the greatest length, and its ratio key."""
    from grn_scale.data.buckets import bucket, latent_frames

    square = bucket(1.0, settings.latent_side)
    return (latent_frames(settings.max_frames), *square.grid), square.ratio_key


def _cpu_field(field: str) -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    """Those of the CPU's extensions that decide how quickly it multiplies matrices."""
    return sorted(set(_cpu_field("flags").split()) & {"avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"})

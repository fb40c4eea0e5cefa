"""Whether the GPUs of this node are there and answer."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path

from grn_scale.slurm.preflight_check import Failed, Passed, Skipped

DRIVER_FILE = Path("/proc/driver/nvidia/version")
SMI_SECONDS = 30
LEAST_FREE = 0.8
"""Share of a device's memory: less means that another process sits on it."""
SIDE = 256
"""Of the matrices that each device multiplies; a product of ones is exact in bf16."""
_DRIVER = re.compile(r"Module\s+(?:for\s+\S+\s+)?(\d+(?:\.\d+)+)")


def check_devices(wanted: int) -> Passed:
    """Each of at least `wanted` CUDA devices computes a product; none has memory that cannot be replaced, or is in
    use. One that has counted uncorrectable errors goes on working: a warning."""
    if not wanted:
        raise Skipped("no GPUs are asked for")
    import torch

    driver = driver_version()
    if torch.version.cuda is None:
        if not driver:
            raise Skipped("torch is a CPU build")
        raise Failed(f"torch {torch.__version__} is a CPU build, but the node has NVIDIA driver {driver}",
                     "install torch for CUDA in the job's environment")
    count = torch.cuda.device_count()
    if count < wanted:
        raise Failed(f"{wanted} devices are asked for, torch {torch.__version__} sees {count} (driver "
                     f"{driver or 'not found'})", "look at nvidia-smi and CUDA_VISIBLE_DEVICES on the node")
    problems = [problem for device in range(wanted) if (problem := _problem(device))]
    lost, odd, unknown = memory_errors({str(torch.cuda.get_device_properties(device).uuid) for device in range(wanted)})
    if problems or lost:
        raise Failed("; ".join([*problems, *lost]), "exclude the node and have it looked at")
    names = sorted({torch.cuda.get_device_name(device) for device in range(wanted)})
    return Passed(f"{wanted} x {', '.join(names)}, driver {driver or 'unknown'}{unknown}", warning="; ".join(odd))


def _problem(device: int) -> str:
    """What is wrong with a device, empty where it computes."""
    import torch

    try:
        free, total = torch.cuda.mem_get_info(device)
        ones = torch.ones(SIDE, SIDE, dtype=torch.bfloat16, device=f"cuda:{device}")
        exact = bool((ones @ ones == SIDE).all())
    except RuntimeError as error:
        return f"device {device} does not answer: {str(error).splitlines()[0]}"
    if not exact:
        return f"device {device} computes wrong numbers"
    if free < LEAST_FREE * total:
        return (f"device {device} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process uses it "
                "(nvidia-smi on the node)")
    return ""


def driver_version() -> str:
    """Version of the NVIDIA driver; empty where there is none."""
    try:
        found = _DRIVER.search(DRIVER_FILE.read_text(encoding="utf-8", errors="replace"))
    except (FileNotFoundError, NotADirectoryError):
        found = None  # not every container shows it
    if found:
        return found[1]
    rows = _smi("--query-gpu=driver_version")
    return rows[0][0] if rows else ""


def memory_errors(devices: set[str]) -> tuple[list[str], list[str], str]:
    """(a sentence for each device with lost memory, for each that had errors, what was not looked at), by nvidia-smi.

    devices: UUIDs without their prefix. Of others (a node need not hide them) nothing is said.
    """
    errors = _of(devices, "--query-gpu=uuid,ecc.errors.uncorrected.volatile.total")
    remapped = _of(devices, "--query-remapped-rows=gpu_uuid,remapped_rows.failure")
    odd = [f"{uuid} has {count} uncorrectable memory errors since its driver was loaded; a reset replaces bad rows"
           for uuid, count in errors if count.isdecimal() and int(count)]
    lost = [f"{uuid} has no rows left to replace bad memory with"
            for uuid, failure in remapped if failure in ("1", "Yes")]
    return lost, odd, "" if errors else "; memory errors not looked at: nvidia-smi says nothing about these devices"


def _of(devices: set[str], query: str) -> list[list[str]]:
    return [row for row in _smi(query) if len(row) == 2 and row[0].removeprefix("GPU-") in devices]


def _smi(query: str) -> list[list[str]]:
    """A row for each device; none where there is no nvidia-smi or it knows no such query."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True,
                              check=False, timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"nvidia-smi did not answer within {SMI_SECONDS} s", "exclude the node and have it looked "
                     "at: its driver hangs") from error
    lines = [] if done.returncode else done.stdout.splitlines()
    return [[cell.strip() for cell in row] for row in csv.reader(lines)]

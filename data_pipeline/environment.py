"""What the bytes of a shard depend on besides manifest, media files and settings: on what and with what it is made.

Only the kinds of things that are known to change a bit: kernels differ by device and by the vector instructions that a
CPU has, sums by the number of threads and by what runs together, frames by decoder and scaler, captions by what mends
and splits them, parquet files by their writer.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import av
import torch

from grn_scale.config.data_schema import TokenizeConfig

LIBRARIES = ("torch", "av", "numpy", "PIL", "ftfy", "sentencepiece", "transformers", "pyarrow")
FFMPEG = ("libavcodec", "libswscale")

Environment = Mapping[str, Any]
"""Fact -> value, as JSON has it; equal where the same chunk gives the same bytes."""


def environment(config: TokenizeConfig, device: str) -> Environment:
    """The facts of this process. device: cpu or cuda, which its encoders run on."""
    facts: dict[str, Any] = {"device": device}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32}
    else:
        facts |= {"cpu": torch.backends.cpu.get_cpu_capability(), "tokenize.threads": config.threads}
    facts |= {"tokenize.batch_clips": config.batch_clips, "float32 matmul": torch.get_float32_matmul_precision()}
    facts |= {name: ".".join(map(str, av.library_versions[name])) for name in FFMPEG}
    return facts | {name: str(importlib.import_module(name).__version__) for name in LIBRARIES}


def differences(old: Environment, new: Environment) -> str:
    """The facts that are not the same, for messages: "torch 2.12.0 -> 2.13.0; ..."; "" where all are."""
    return "; ".join(f"{name} {old.get(name, '(not known)')} -> {new.get(name, '(not known)')}"
                     for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name))

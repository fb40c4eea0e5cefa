"""Quicker implementations of norms, rotation, loss and update, where they are asked for and can be had.

apex and Transformer Engine are looked for only where the configuration names them.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from grn_scale.config.kernel_schema import KernelsConfig
from grn_scale.config.schema import OptimizerConfig
from grn_scale.errors import UserError
from grn_scale.model.attention_kernels import AttentionKernels, attention_kernels
from grn_scale.model.loss import CrossEntropy, cross_entropy
from grn_scale.model.rope import rotate

log = logging.getLogger("grn_scale.parallel")
Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""(x, weight, eps) -> RMS norm of the last dimension, computed in fp32, in the dtype of x."""
MODULES = {
    ("apex", "adamw"): "apex.optimizers",
    ("apex", "norm"): "apex.normalization.fused_layer_norm",
    ("apex", "cross_entropy"): "apex.contrib.xentropy",
    ("transformer_engine", "adamw"): "transformer_engine.pytorch.optimizers",
}


@dataclass(frozen=True)
class Kernels:
    """What the layers, the head and the update of a process run."""

    attention: AttentionKernels
    norm: Norm
    rotate: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    cross_entropy: CrossEntropy
    compiled: bool
    """Whether element-wise chains are compiled, the SwiGLU of megatron's MLP among them."""


def choose(settings: KernelsConfig, device: torch.device, dtype: torch.dtype) -> Kernels:
    """The kernels of this configuration; UserError where one that is named cannot be had."""
    compiled = settings.compile == "always" or (settings.compile == "auto" and device.type == "cuda")
    if compiled and (problem := _problem_of_compiling(device)):
        if settings.compile == "always":
            raise UserError(f"kernels.compile=always, but {problem}, or set kernels.compile=auto")
        log.warning("element-wise chains run as they are, one kernel after the other: %s", problem)
        compiled = False
    norm = {"torch": torch_norm, "apex": _apex_norm}[settings.norm]
    if settings.norm == "apex":
        _need("apex", "norm")
    entropy = cross_entropy
    if settings.cross_entropy == "apex":
        entropy = _apex_cross_entropy(_need("apex", "cross_entropy"))
    attention = attention_kernels(settings.attention, device, dtype)
    log.info("kernels: attention %s, norm %s, cross entropy %s, update %s%s", attention, settings.norm,
             settings.cross_entropy, settings.adamw, ", element-wise chains compiled" if compiled else "")
    return Kernels(
        attention, _compile(torch_norm) if compiled and norm is torch_norm else norm,
        _compile(rotate) if compiled else rotate, entropy, compiled)


def decay_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict]:
    """Parameter groups of an optimizer: one-dimensional tensors are not decayed."""
    parameters = list(parameters)
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == many] for many in (True, False))
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(groups: Sequence[dict], settings: OptimizerConfig, implementation: str) -> torch.optim.Optimizer:
    """AdamW with decoupled weight decay, one kernel for each tensor or all of them; UserError where it is missing."""
    if implementation == "torch":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)
    optimizer = _need(implementation, "adamw").FusedAdam
    try:
        return optimizer(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, adam_w_mode=True)
    except RuntimeError as error:  # apex without its CUDA extensions
        raise UserError(f"kernels.adamw={implementation}: {error}; install it with its CUDA extensions, or set "
                        "kernels.adamw=torch") from error


def torch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`Norm` in plain torch."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def _apex_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _need("apex", "norm").fused_rms_norm_affine(x, weight, x.shape[-1:], eps)


def _apex_cross_entropy(apex: ModuleType) -> CrossEntropy:
    def entropy(logits_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        # class 0 is a class like the others, not padding
        return apex.SoftmaxCrossEntropyLoss.apply(logits_NK, targets_N, 0.0, -1, False)

    return entropy


@lru_cache
def _need(library: str, field: str) -> ModuleType:
    """The module of a library that kernels.<field> asks for. There is another project of the name apex on PyPI."""
    name = MODULES[library, field]
    try:
        if (library, field) == ("apex", "norm"):
            importlib.import_module("fused_layer_norm_cuda")  # which apex looks for at the first call only
        return importlib.import_module(name)
    except ImportError as error:
        source = "apex, from https://github.com/NVIDIA/apex with its CUDA extensions (PyPI's package of that name is " \
                 "another project)" if library == "apex" else "transformer-engine[pytorch]"
        raise UserError(f"kernels.{field}={library}: {name} cannot be imported ({error}); install {source}, or set "
                        f"kernels.{field}=torch") from error


def _problem_of_compiling(device: torch.device) -> str:
    """Why torch.compile would fail at the first step, and the remedy; empty where it would not. On a GPU triton builds
    a launcher for each kernel with a C compiler and Python's headers."""
    if device.type == "cpu":
        return "" if any(map(shutil.which, ("c++", "g++", "clang++"))) else (
            "there is no C++ compiler on PATH: install g++")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))):
        return "there is no C compiler on PATH: install gcc"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return f"{sysconfig.get_path('include')} has no Python.h: install Python's headers (python3-dev)"
    return ""


def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)

"""What megatron-core and DeepSpeed need to run without CUDA: the production parallel code over gloo on CPUs.

Active only where CUDA is absent. megatron asks torch.cuda for the current device, streams and generators, and
its schedules create one counter on a literal device="cuda"; each of these is pointed at the CPU. This is the
only module that changes anything in torch or megatron.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode


class _LiteralCudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@contextlib.contextmanager
def schedule_device() -> Iterator[None]:
    """Context of a megatron schedule call."""
    if torch.cuda.is_available():
        yield
    else:
        with _LiteralCudaToCpu():
            yield


def install() -> None:
    """Prepare this process for megatron-core and DeepSpeed; before either is imported."""
    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)

    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def quiet_warnings() -> None:
    """No warnings about accelerators that are optional, or about the names torch's collectives will have one day."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def quiet_deepspeed() -> None:
    """DeepSpeed's log to stderr, from warnings on (stdout is the result), without just-in-time compilation."""
    import deepspeed.ops
    from deepspeed.utils import logger

    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # The shared-memory extension would be compiled at start and needs a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

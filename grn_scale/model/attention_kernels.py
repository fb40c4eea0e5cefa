"""Kernels of unmasked attention, and which of them takes which segments.

Two forms: `Equal` takes segments of one length as a batch, `Many` takes segments of any lengths one behind the other.
Everything is exact; kernels differ in rounding and speed.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from grn_scale.errors import UserError

Equal = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q, k, v), each [count, heads, length, head_size], -> the outputs, as q."""
Many = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""(q [rows, heads, head_size], k, v, starts of the segments among the queries, among the keys (int32), longest segment
in queries, in keys) -> the outputs, as q."""

SHORT_ON_CPU = 256
"""Keys of a segment up to which an explicit softmax beats torch's CPU kernel (its bf16 backward, fourfold at 23)."""
LONG = 1024
"""Keys of a segment from which on one call fills a GPU, so that the quickest kernel counts more than few calls."""
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
HALF = (torch.bfloat16, torch.float16)
NEEDED_CUDNN = 91501
"""Before it, lengths that are no multiple of 128 may fail or read outside in the backward pass (pytorch #169849)."""
CAPABILITIES = {"flash3": (9,), "flash4": (9, 10)}
"""Major compute capabilities of the GPUs that a FlashAttention has kernels for."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionKernels:
    """equal takes segments of `long` keys or more; `many` all others, and everything where there is no `equal`."""

    equal: Equal | None = None
    many: Many | None = None
    long: int = 0

    def at_once(self, keys: int) -> bool:
        """Whether segments of so many keys go to `many`."""
        return self.many is not None and (self.equal is None or keys < self.long)

    def __str__(self) -> str:
        if self.many is None or self.equal is None:
            return (self.many or self.equal).__name__
        return f"{self.equal.__name__} from {self.long} keys on, {self.many.__name__} below"


def attention_kernels(name: str, device: torch.device, dtype: torch.dtype) -> AttentionKernels:
    """The kernels of kernels.attention (see `KernelsConfig`) for this device and dtype.

    UserError where a kernel that is asked for by name cannot be had.
    """
    if device.type == "cpu" or dtype not in HALF:
        return AttentionKernels(sdpa)
    _restore_flash()
    if name == "sdpa":
        return AttentionKernels(sdpa)
    if name == "transformer_engine":
        return AttentionKernels(many=transformer_engine_kernel())
    old_cudnn, no_varlen = _problem_of_cudnn(), _problem_of_varlen()
    if name == "auto":
        for problem in filter(None, (old_cudnn, no_varlen)):
            log.info("kernels.attention=auto does without a kernel: %s", problem)
        if no_varlen:
            return AttentionKernels(sdpa if old_cudnn else cudnn_sdpa)
        return AttentionKernels(many=varlen) if old_cudnn else AttentionKernels(cudnn_sdpa, varlen, LONG)
    problem = old_cudnn if name == "cudnn" else no_varlen
    if problem:
        raise UserError(f"kernels.attention={name}: {problem}, or set kernels.attention=auto")
    if name == "cudnn":
        return AttentionKernels(cudnn_sdpa)
    if name in CAPABILITIES:
        _activate(name, device)
    return AttentionKernels(many=varlen)


def _problem_of_cudnn() -> str:
    """Why cuDNN's attention is not to be trusted here; empty where it is."""
    version = torch.backends.cudnn.version()
    if version is None:
        return "torch has no cuDNN; install a build of torch with it"
    return "" if version >= NEEDED_CUDNN else (
        f"cuDNN {version} has faults with lengths that are no multiple of 128; install 9.15.1 or newer")


def _problem_of_varlen() -> str:
    try:
        importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return f"torch {torch.__version__} has no attention over segments of many lengths; install 2.11 or newer"
    return ""


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's fused attention; on a CPU short segments by a softmax in fp32."""
    if q.device.type != "cpu" or k.shape[2] > SHORT_ON_CPU:
        return F.scaled_dot_product_attention(q, k, v)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).to(v.dtype) @ v


def cudnn_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's fused attention by cuDNN, or by the next best kernel where cuDNN has none for these sizes."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor, k_starts: torch.Tensor,
           q_longest: int, k_longest: int) -> torch.Tensor:
    """torch's FlashAttention over segments of any length; FlashAttention 2 unless another one is activated."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, q_starts, k_starts, q_longest, k_longest)


def _restore_flash() -> None:
    """FlashAttention 2 for what this process runs from here on: an activation holds until it is undone."""
    from torch.nn import attention

    if restore := getattr(attention, "restore_flash_attention_impl", None):
        restore(_raise_warn=False)


def _activate(name: str, device: torch.device) -> None:
    from torch.nn import attention

    implementation = f"FA{name[-1]}"
    if implementation not in getattr(attention, "list_flash_attention_impls", list)():
        raise UserError(f"kernels.attention={name}: this torch ({torch.__version__}) does not know {implementation}; "
                        "install a torch of 2.11 or newer, or set kernels.attention=auto")
    try:
        attention.activate_flash_attention_impl(implementation)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"kernels.attention={name}: {implementation} cannot be loaded ({error}); install it for this "
                        "torch and GPU, or set kernels.attention=auto") from error
    if (capability := torch.cuda.get_device_capability(device))[0] not in CAPABILITIES[name]:
        _restore_flash()
        raise UserError(f"kernels.attention={name}: {implementation} has no kernels for a GPU of compute capability "
                        f"{capability[0]}.{capability[1]}; set kernels.attention=auto")


def transformer_engine_kernel() -> Many:
    """Transformer Engine's attention over segments of any length."""
    try:
        from transformer_engine.pytorch import DotProductAttention
    except ImportError as error:
        raise UserError(f"kernels.attention=transformer_engine: it cannot be imported ({error}); install "
                        "transformer-engine[pytorch], or set kernels.attention=auto") from error
    modules: dict[tuple[int, int], torch.nn.Module] = {}

    def transformer_engine(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_starts: torch.Tensor,
                           k_starts: torch.Tensor, q_longest: int, k_longest: int) -> torch.Tensor:
        heads, size = q.shape[1:]
        if (heads, size) not in modules:
            modules[heads, size] = DotProductAttention(heads, size, qkv_format="thd", attn_mask_type="padding",
                                                       attention_dropout=0.0)
        out = modules[heads, size](q, k, v, cu_seqlens_q=q_starts, cu_seqlens_kv=k_starts, max_seqlen_q=q_longest,
                                   max_seqlen_kv=k_longest)
        return out.view_as(q)

    return transformer_engine

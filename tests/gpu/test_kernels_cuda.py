"""Every kernel that can be had here computes what plain torch computes: python -m pytest -m gpu

A library that is not installed skips its cases. GRN_TEST_DEVICE=cpu runs the cases that a CPU can run.
"""

from __future__ import annotations

import os

import pytest
import torch

from grn_scale.config.kernel_schema import ATTENTION, KernelsConfig
from grn_scale.config.schema import OptimizerConfig
from grn_scale.errors import UserError
from grn_scale.model.attention import packed_attention
from grn_scale.model.attention_kernels import AttentionKernels, attention_kernels, sdpa
from grn_scale.model.loss import cross_entropy
from grn_scale.model.rope import rotate
from grn_scale.model.sequence import Grid, lay_out
from grn_scale.parallel.fused import Kernels, adamw, choose, torch_norm

pytestmark = pytest.mark.gpu
GRIDS = [Grid((1, 2, 2), 1.0, 3), Grid((3, 16, 30), 1.0, 20), Grid((1, 2, 2), 1.0, 3), Grid((2, 12, 13), 1.0, 1),
         Grid((2, 20, 36), 1.0, 7, first_frame=True)]
HEADS, SIZE = 18, 128
LIBRARIES = ("torch", "apex", "transformer_engine")


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    name = os.environ.get("GRN_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name)


def chosen(device: torch.device, dtype: torch.dtype, **settings: str) -> Kernels:
    try:
        return choose(KernelsConfig(**settings), device, dtype)
    except UserError as error:
        pytest.skip(str(error))


def with_gradients(function, leaves: list[torch.Tensor], *rest) -> list[torch.Tensor]:
    """Output and gradients, in fp32."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *rest)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [x.float() for x in (out.detach(), *torch.autograd.grad((out.float() * weight).sum(), leaves))]


def close(found: list[torch.Tensor], expected: list[torch.Tensor], bound: float) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_fp32_within_the_rounding_of_bf16(device: torch.device, name: str, form: str) -> None:
    try:
        kernels = attention_kernels(name, device, torch.bfloat16)
    except UserError as error:
        pytest.skip(str(error))
    layout = lay_out(GRIDS, form, SIZE, length=4224).to(device)
    generator = torch.Generator().manual_seed(1)
    leaves = [torch.randn(layout.length, HEADS, SIZE, generator=generator).to(device) for _ in range(3)]
    expected = with_gradients(packed_attention, leaves, layout, AttentionKernels(sdpa))
    found = with_gradients(packed_attention, [leaf.bfloat16() for leaf in leaves], layout, kernels)
    close(found, expected, 1e-2)


@pytest.mark.parametrize("compile", ["never", "always"])
@pytest.mark.parametrize("library", ["torch", "apex"])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norms_are_those_of_torch(device: torch.device, library: str, compile: str, dtype: torch.dtype,
                                  bound: float) -> None:
    norm = chosen(device, dtype, norm=library, compile=compile).norm
    generator = torch.Generator().manual_seed(1)
    leaves = [(torch.randn(257, 1, 2304, generator=generator) * 3).to(device), torch.rand(2304).to(device)]
    close(with_gradients(norm, [leaf.to(dtype) for leaf in leaves], 1e-6),
          with_gradients(torch_norm, [leaf.to(dtype).float() for leaf in leaves], 1e-6), bound)


def test_the_compiled_rotation_is_the_plain_one(device: torch.device) -> None:
    layout = lay_out(GRIDS, "v2", SIZE, length=4224).to(device)
    x = torch.randn(layout.length, HEADS, SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    turn = chosen(device, torch.float32, compile="always").rotate
    close(with_gradients(turn, [x], layout.cos, layout.sin), with_gradients(rotate, [x], layout.cos, layout.sin), 1e-6)


def test_apex_cross_entropy_is_that_of_torch_for_every_class(device: torch.device) -> None:
    entropy = chosen(device, torch.float32, cross_entropy="apex").cross_entropy
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4096, 16, generator=generator).to(device)
    targets = torch.randint(0, 16, (4096,), generator=generator).to(device)
    assert (targets == 0).any()
    close(with_gradients(entropy, [logits], targets), with_gradients(cross_entropy, [logits], targets), 1e-5)


@pytest.mark.parametrize("library", LIBRARIES)
def test_updates_are_those_of_plain_adamw(device: torch.device, library: str) -> None:
    settings = OptimizerConfig(lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1000, generator=generator)
    mine, plain = (torch.nn.Parameter(start.to(device).clone()) for _ in range(2))
    try:
        optimizer = adamw([{"params": [mine], "weight_decay": 0.1}], settings, library)
    except UserError as error:
        pytest.skip(str(error))
    beside = torch.optim.AdamW([plain], lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=0.1,
                               foreach=False, fused=False)
    for _ in range(5):
        gradient = torch.randn(1000, generator=generator).to(device)
        for parameter, each in ((mine, optimizer), (plain, beside)):
            parameter.grad = gradient.clone()
            each.step()
    close([mine.detach()], [plain.detach()], 1e-6)
    state = optimizer.state[mine]
    close([state[key] for key in ("exp_avg", "exp_avg_sq")], [beside.state[plain][key] for key in
                                                              ("exp_avg", "exp_avg_sq")], 1e-6)

"""Initial weights drawn from (seed, official name), so that every layout starts from the same model."""

from __future__ import annotations

import torch

from grn_scale import keyed

STD = 0.02


def initial_tensor(name: str, shape: torch.Size | tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 CPU tensor of the global parameter `name`: Linear weights N(0, 0.02), biases 0, norms 1
    (GRN reference, section 5)."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(keyed.key64(seed, "init", name) >> 1)
    return torch.empty(shape).normal_(0.0, STD, generator=generator)


@torch.no_grad()
def initialize(model: torch.nn.Module, seed: int) -> None:
    """Fill a plain model, whose parameter names are the official ones."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, seed))

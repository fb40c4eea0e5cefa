"""Initial weights of the class-to-image model, drawn from (seed, official name) as the text model's are.

The recipe is that of diffusion transformers with adaptive layer norm (Peebles & Xie, "Scalable Diffusion Models with
Transformers"): matrices uniform after Glorot, embeddings and the noise-level MLP N(0, 0.02), biases 0, norms 1, and
zeros where a block or the head enters, so that at first every block is the identity and every label equally likely.
"""

from __future__ import annotations

import math

import torch

from grn_scale import keyed
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.model.initialize import initial_tensor as normal_tensor

NORMAL = ("y_embedder.", "t_embedder.", "in_context_posemb")
ZERO = ("adaLN_modulation.", "final_layer.linear.")


def initial_tensor(name: str, shape: torch.Size | tuple[int, ...], seed: int) -> torch.Tensor:
    """fp32 CPU tensor of the parameter `name` (official, without a prefix)."""
    if any(part in name for part in ZERO):
        return torch.zeros(shape)
    if len(shape) == 1 or name.startswith(NORMAL):
        return normal_tensor(name, shape, seed)
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
    generator = torch.Generator().manual_seed(keyed.key64(seed, "init", name) >> 1)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialize(model: ClassGRN, seed: int) -> None:
    """Fill a model in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(name, parameter.shape, seed))

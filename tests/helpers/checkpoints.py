"""Small named tensors that the checkpoint tests save and load."""

import torch

from grn_scale.checkpoint.chunks import whole


def weights(fill=0.0):
    return {"blocks.0.weight": torch.arange(30.0).reshape(6, 5) + fill,
            "blocks.0.bias": (torch.arange(6.0) + fill).bfloat16(),
            "word_embed.weight": torch.arange(24.0).reshape(2, 3, 4).bfloat16() - fill,
            "scale": torch.tensor(0.5 + fill)}


def chunks(tensors):
    return [whole(name, tensor) for name, tensor in tensors.items()]


def empty_like(tensors):
    return {name: torch.full_like(tensor, -7) for name, tensor in tensors.items()}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)

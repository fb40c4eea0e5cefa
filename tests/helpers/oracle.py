"""The text/video network written down a second time from its description, sample by sample, in fp64.

Nothing of grn_scale.model is used, nothing is packed, and attention is a dense mask, so that agreement means
something: shapes that no recording reaches are checked against this (GRN reference, sections 3 and 4).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from grn_scale.config.schema import ModelConfig


def oracle_logits(weights: Mapping[str, Tensor], config: ModelConfig, labels: Tensor, text: Tensor, level: float,
                  ratio_key: float, first_frame: bool) -> Tensor:
    """fp64 [predicted tokens, D, K] of one sample, its labels [D, t, h, w] as the network reads them."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    channels, frames, height, width = labels.shape
    area = math.sqrt(225 * 75 / ratio_key)
    span_h, span_w = int(ratio_key * area), int(area)
    tokens, positions = [], []
    for f in range(frames):
        for i in range(height):
            for j in range(width):
                one_hot = torch.zeros(channels * config.classes, dtype=torch.float64)
                for d in range(channels):
                    one_hot[d * config.classes + int(labels[d, f, i, j])] = 1
                tokens.append(w["word_embed.weight"] @ one_hot + w["word_embed.bias"])
                # Half to even, of a product in fp32.
                rows, columns = (torch.tensor(n, dtype=torch.float32) * (span / count)
                                 for n, span, count in ((i, span_h, height), (j, span_w, width)))
                positions.append((600 + f, round(rows.item()), round(columns.item())))
    visual = len(tokens)
    for k, state in enumerate(text.double()):
        tokens.append(w["text_proj.weight"] @ state + w["text_proj.bias"])
        positions.append((k, 0, 0))
    angles = [level * 10_000 ** (-j / 128) for j in range(128)]
    x = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    x = w["pt_embedder.mlp.0.weight"] @ x + w["pt_embedder.mlp.0.bias"]
    tokens.append(w["pt_embedder.mlp.2.weight"] @ (x * x.sigmoid()) + w["pt_embedder.mlp.2.bias"])
    positions.append((512, 0, 0))

    sees = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    if config.layout == "v1":
        is_text = torch.zeros(len(tokens), dtype=torch.bool)
        is_text[visual:-1] = True
        sees[is_text] = is_text
    h = torch.stack(tokens)
    per_chunk = config.num_layers // config.num_chunks
    for layer in range(config.num_layers):
        name = f"block_chunks.{layer // per_chunk}.module.{layer % per_chunk}."
        x = norm(h, w[name + "input_layernorm.weight"])
        heads = []
        size = config.hidden_size // config.num_heads
        for head in range(config.num_heads):
            rows = slice(head * size, (head + 1) * size)
            q, k, v = (x @ w[f"{name}attn.{part}_proj.weight"][rows].T for part in "qkv")
            q, k = (turned(norm(y, w[f"{name}attn.{part}_norm.weight"]), positions) for part, y in (("q", q), ("k", k)))
            scores = (q @ k.T / math.sqrt(size)).masked_fill(~sees, -math.inf)
            heads.append(scores.softmax(dim=1) @ v)
        h = h + torch.cat(heads, dim=1) @ w[name + "attn.o_proj.weight"].T
        x = norm(h, w[name + "post_attention_layernorm.weight"])
        gate = x @ w[name + "mlp.gate_proj.weight"].T
        h = h + (gate * gate.sigmoid() * (x @ w[name + "mlp.up_proj.weight"].T)) @ w[name + "mlp.down_proj.weight"].T
    h = h[height * width * first_frame:visual]
    logits = norm(h, w["head.norm.weight"]) @ w["head.proj.weight"].T + w["head.proj.bias"]
    return logits.reshape(len(h), channels, config.classes)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, positions: list[tuple[int, int, int]]) -> Tensor:
    """Every pair (2j, 2j+1) as a complex number, times exp(i angle)."""
    half = x.shape[1] // 2
    third = half // 3
    angle = torch.tensor([[p * 10_000 ** (-j / n) for p, n in zip(at, (third, third, half - 2 * third))
                           for j in range(n)] for at in positions], dtype=torch.float64)
    pairs = torch.view_as_complex(x.reshape(len(x), half, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).reshape(x.shape)

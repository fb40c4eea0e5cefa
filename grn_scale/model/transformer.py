"""The GRN text/video transformer in plain torch, with the official key names.

It states the mathematics, serves sampling on one device, and is what every parallel layout is compared with.

Legend: S rows of the packed sequence, V visual tokens, P predicted tokens, T text tokens, N samples, C width,
H heads, E head size, F MLP width, D labels a token, K classes a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import nn

from grn_scale.config.schema import ModelConfig
from grn_scale.model.attention import packed_attention
from grn_scale.model.rope import rotate
from grn_scale.model.sequence import Grid, SequenceLayout, lay_out
from grn_scale.model.sequence_part import SequencePart

KeyValueHook = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Takes the keys (turned) and values [S, H, E] of one layer's rows and gives those that are attended to."""
NORM_EPS = 1e-6
LEVEL_FEATURES = 256


@dataclass(frozen=True)
class ModelInput:
    """What the network reads: one packed sequence, or this process's part of one."""

    layout: SequenceLayout
    """Of the whole sequence."""
    labels_VD: torch.Tensor
    """uint8 [V, D]: the mixed labels, and the clean ones of a given first frame."""
    text_TC: torch.Tensor
    """[T, text_hidden_size]"""
    level_N: torch.Tensor
    """fp32 [N]: noise level p of each sample (share of true labels)."""
    part: SequencePart | None = None
    """The rows that the tokens above stand in; None: all of them."""


@dataclass(frozen=True)
class Sample:
    """One sample as the network sees it."""

    labels: torch.Tensor
    """uint8 [D, t, h, w]: mixed labels (frame 0 clean where `first_frame`)."""
    text_states: torch.Tensor
    """[n, text_hidden_size]"""
    signal_ratio: float
    ratio_key: float
    first_frame: bool = False


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + 1e-6) * weight, in fp32, in the dtype of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), NORM_EPS).to(x.dtype)


class LevelEmbedder(nn.Module):
    """Noise level p [N] -> [N, C] fp32: 256 features cos and sin of p * 10000^(-j/128), Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(LEVEL_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, level_N: torch.Tensor) -> torch.Tensor:
        half = LEVEL_FEATURES // 2
        frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float32, device=level_N.device) / half)
        angle = level_N.float()[:, None] * frequency
        x = torch.cat((angle.cos(), angle.sin()), dim=1)
        return linear_fp32(self.mlp[2], F.silu(linear_fp32(self.mlp[0], x)))


def linear_fp32(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The layer computed in fp32 whatever the dtype of its weights."""
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x.float(), linear.weight.float(), bias)


class InputEmbedding(nn.Module):
    """Packed sequence [S, C] of label, text and noise-level tokens, computed in fp32; zeros on padding rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embed = nn.Linear(config.label_channels * config.classes, config.hidden_size)
        self.text_proj = nn.Linear(config.text_hidden_size, config.hidden_size)
        self.pt_embedder = LevelEmbedder(config.hidden_size)

    def embed_labels(self, labels_VD: torch.Tensor) -> torch.Tensor:
        """Linear layer of the one-hot labels (input channel = label channel * K + class), without the one-hot."""
        weight, bias = self.word_embed.weight.float(), self.word_embed.bias.float()
        if self.config.classes == 2:
            # x @ W of a two-class one-hot = bits @ (W1 - W0) + sum of W0
            zero, one = weight.unflatten(1, (-1, 2)).unbind(-1)
            return F.linear(labels_VD.float(), one - zero, bias + zero.sum(dim=1))
        channel = torch.arange(self.config.label_channels, device=labels_VD.device) * self.config.classes
        return F.embedding_bag(labels_VD.long() + channel, weight.t(), mode="sum") + bias

    def forward(self, x: ModelInput, dtype: torch.dtype) -> torch.Tensor:
        place = x.part or x.layout
        rows = torch.cat((place.visual_rows, place.text_rows, place.level_rows))
        tokens = torch.cat((self.embed_labels(x.labels_VD), linear_fp32(self.text_proj, x.text_TC),
                            self.pt_embedder(x.level_N)))
        sequence = tokens.new_zeros(place.length, tokens.shape[1])
        return sequence.index_copy(0, rows, tokens).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj = nn.Linear(size, size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)

    def forward(self, x_SC: torch.Tensor, layout: SequenceLayout, hook: KeyValueHook | None = None) -> torch.Tensor:
        q, k, v = (proj(x_SC).unflatten(-1, (self.num_heads, -1)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(self.q_norm(q), layout.cos, layout.sin)
        k = rotate(self.k_norm(k), layout.cos, layout.sin)
        if hook is not None:
            k, v = hook(k, v)
        return self.o_proj(packed_attention(q, k, v, layout).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_SC: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_SC)) * self.up_proj(x_SC))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x_SC: torch.Tensor, layout: SequenceLayout, hook: KeyValueHook | None = None) -> torch.Tensor:
        x_SC = x_SC + self.attn(self.input_layernorm(x_SC), layout, hook)
        return x_SC + self.mlp(self.post_attention_layernorm(x_SC))


class Head(nn.Module):
    """Hidden states [P, C] -> scores in fp32: logits [P, D, K], or for K = 2 their difference [P, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.norm = RMSNorm(config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.label_channels * config.classes)

    def logits(self, x_PC: torch.Tensor) -> torch.Tensor:
        return linear_fp32(self.proj, self.norm(x_PC.float())).unflatten(-1, (-1, self.classes))

    def forward(self, x_PC: torch.Tensor) -> torch.Tensor:
        if self.classes > 2:
            return self.logits(x_PC)
        return binary_scores(self.norm(x_PC.float()), self.proj.weight, self.proj.bias)


def binary_scores(x_PC: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logit of class 1 minus logit of class 0, [P, D]: all that loss, entropy and sampling of two classes need."""
    zero, one = weight.float().unflatten(0, (-1, 2)).unbind(1)
    bias_zero, bias_one = bias.float().unflatten(0, (-1, 2)).unbind(1)
    return F.linear(x_PC, one - zero, bias_one - bias_zero)


class Chunk(nn.Module):
    """Layers under the official name block_chunks.<chunk>.module.<i>."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.module = nn.ModuleList(Block(config) for _ in range(config.num_layers // config.num_chunks))


class GRN(InputEmbedding):
    """The whole network. Inherits the embedding, whose parameters have no prefix of their own in official files."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.block_chunks = nn.ModuleList(Chunk(config) for _ in range(config.num_chunks))
        self.head = Head(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embed.weight.dtype

    def blocks(self) -> Iterator[Block]:
        """All of them, first to last."""
        return (block for chunk in self.block_chunks for block in chunk.module)

    def hidden(self, x: ModelInput, hooks: Iterable[KeyValueHook] | None = None) -> torch.Tensor:
        """States [P, C] of the predicted tokens, after the last block.

        hooks: one for each block (see `grn_scale.model.text_cache`).
        """
        h_SC = super().forward(x, self.dtype)
        for block, hook in zip(self.blocks(), repeat(None) if hooks is None else hooks):
            h_SC = block(h_SC, x.layout, hook)
        return h_SC.index_select(0, x.layout.predicted_rows)

    def forward(self, x: ModelInput) -> torch.Tensor:
        """Scores of the predicted tokens, as `Head` gives them."""
        return self.head(self.hidden(x))

    def logits(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        """fp32 [predicted tokens, D, K] of each sample; all run as one packed sequence."""
        x, counts = pack_samples(samples, self.config, self.word_embed.weight.device)
        return list(self.head.logits(self.hidden(x)).split(counts))


def pack_samples(samples: Sequence[Sample], config: ModelConfig,
                 device: torch.device) -> tuple[ModelInput, list[int]]:
    """One packed sequence of the samples, and the number of predicted tokens of each."""
    grids = [Grid(tuple(s.labels.shape[1:]), s.ratio_key, s.text_states.shape[0], s.first_frame) for s in samples]
    layout = lay_out(grids, config.layout, config.head_size).to(device)
    labels = torch.cat([s.labels.to(device).flatten(1).t() for s in samples])
    text = torch.cat([s.text_states.to(device) for s in samples])
    level = torch.tensor([s.signal_ratio for s in samples], dtype=torch.float32, device=device)
    return ModelInput(layout, labels, text, level), [grid.predicted_tokens for grid in grids]

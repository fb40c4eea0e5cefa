"""The class-to-image GRN in plain torch, with the official key names (GRN reference, section 7).

A transformer over the labels of one square latent image. Noise level and class steer every block through adaptive
layer norm; from block `in_context_start` on, the class also stands as tokens in front of the image.

Legend: B images, N tokens an image (h * w), S tokens with those in front, C width, H heads, E head size,
D labels a token, K classes a label, P = B * N tokens of all images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from grn_scale.class_to_image.positions import rotary_tables, sine_table
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.errors import UserError
from grn_scale.model.rope import rotate
from grn_scale.model.transformer import LevelEmbedder, RMSNorm, linear_fp32


class LabelEmbedder(nn.Module):
    """Labels [P, D] -> [P, C] fp32: one-hot (channel = class * D + label channel), to the bottleneck, to the width."""

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.proj1 = nn.Conv2d(config.label_channels * config.classes, config.bottleneck_size, 1, bias=False)
        self.proj2 = nn.Conv2d(config.bottleneck_size, config.hidden_size, 1)

    def forward(self, labels_PD: torch.Tensor) -> torch.Tensor:
        weight = self.proj1.weight.float().flatten(1)
        if self.classes == 2:
            # x @ W of a two-class one-hot = bits @ (W1 - W0) + sum of W0
            zero, one = weight.chunk(2, dim=1)
            x = F.linear(labels_PD.float(), one - zero, zero.sum(dim=1))
        else:
            channels = labels_PD.shape[1]
            place = labels_PD.long() * channels + torch.arange(channels, device=labels_PD.device)
            x = F.embedding_bag(place, weight.t(), mode="sum")
        return F.linear(x, self.proj2.weight.float().flatten(1), self.proj2.bias.float())


class ClassEmbedder(nn.Module):
    """Class ids [B] -> [B, C] fp32; the last row is the null class."""

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, class_B: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(class_B).float()


class Attention(nn.Module):
    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(size, 3 * size)
        self.q_norm = RMSNorm(config.head_size)
        self.k_norm = RMSNorm(config.head_size)
        self.proj = nn.Linear(size, size)

    def forward(self, x_BSC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU; w12 holds gate and up one after the other."""

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.w12 = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size)
        self.w3 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_BSC: torch.Tensor) -> torch.Tensor:
        gate, up = self.w12(x_BSC).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


def modulation(hidden_size: int, parts: int) -> nn.Sequential:
    """Condition [B, C] -> `parts` vectors of that width, side by side. Index 1 of the sequence is an official name."""
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))


def modulate(x_BSC: torch.Tensor, shift_BC: torch.Tensor, scale_BC: torch.Tensor) -> torch.Tensor:
    return x_BSC * (1 + scale_BC[:, None]) + shift_BC[:, None]


class Block(nn.Module):
    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size)
        self.mlp = MLP(config)
        self.adaLN_modulation = modulation(config.hidden_size, 6)

    def forward(self, x_BSC: torch.Tensor, condition_BC: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BC).chunk(6, dim=-1)
        x_BSC = x_BSC + gate1[:, None] * self.attn(modulate(self.norm1(x_BSC), shift1, scale1), cos, sin)
        return x_BSC + gate2[:, None] * self.mlp(modulate(self.norm2(x_BSC), shift2, scale2))


class FinalLayer(nn.Module):
    """Hidden states -> scores, in fp32; the rows of `linear` are class * D + label channel."""

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.classes = config.classes
        self.norm_final = RMSNorm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.label_channels * config.classes)
        self.adaLN_modulation = modulation(config.hidden_size, 2)

    def forward(self, x_BNC: torch.Tensor, condition_BC: torch.Tensor) -> torch.Tensor:
        """fp32 [P, C] that `logits` and `scores` read."""
        shift, scale = linear_fp32(self.adaLN_modulation[1], F.silu(condition_BC.float())).chunk(2, dim=-1)
        return modulate(self.norm_final(x_BNC.float()), shift, scale).flatten(0, 1)

    def logits(self, x_PC: torch.Tensor) -> torch.Tensor:
        """fp32 [P, K, D]."""
        return linear_fp32(self.linear, x_PC).unflatten(-1, (self.classes, -1))

    def scores(self, x_PC: torch.Tensor) -> torch.Tensor:
        """fp32 logits [P, D, K], or for K = 2 their difference [P, D]: all that loss, entropy and sampling need."""
        if self.classes > 2:
            return self.logits(x_PC).transpose(1, 2)
        zero, one = self.linear.weight.float().chunk(2)
        bias_zero, bias_one = self.linear.bias.float().chunk(2)
        return F.linear(x_PC, one - zero, bias_one - bias_zero)


class ClassGRN(nn.Module):
    """The whole network. Weights may be fp32 or bf16; embeddings, norms, last layer and loss are fp32 in any case."""

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.config = config
        self.t_embedder = LevelEmbedder(config.hidden_size)
        self.y_embedder = ClassEmbedder(config)
        self.x_embedder = LabelEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer = FinalLayer(config)
        if config.in_context_length:
            self.in_context_posemb = nn.Parameter(torch.zeros(1, config.in_context_length, config.hidden_size))
        self.register_buffer("pos_embed", sine_table(config.grid, config.hidden_size))
        self._rotary: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}
        """Angles by device and tokens in front: fp32 whatever the weights are, and not in the state dict."""

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj2.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj2.weight.device

    def hidden(self, labels: torch.Tensor, signal: torch.Tensor, class_id: torch.Tensor) -> torch.Tensor:
        """fp32 [P, C] that `final_layer.logits` and `final_layer.scores` read; arguments as in `logits`."""
        config = self.config
        self._check(labels, class_id)
        given = self.y_embedder(class_id)
        condition = self.t_embedder(signal) + given
        tokens = self.x_embedder(labels.flatten(2).transpose(1, 2).flatten(0, 1))
        x = (tokens.unflatten(0, (-1, config.tokens)) + self.pos_embed.float()).to(self.dtype)
        steering = condition.to(self.dtype)
        in_front = 0
        for i, block in enumerate(self.blocks):
            if i == config.in_context_start and config.in_context_length:
                in_front = config.in_context_length
                x = torch.cat(((given[:, None] + self.in_context_posemb.float()).to(self.dtype), x), dim=1)
            x = block(x, steering, *self._rotary_tables(in_front))
        return self.final_layer(x[:, in_front:], condition)

    def logits(self, labels: torch.Tensor, signal: torch.Tensor, class_id: torch.Tensor) -> torch.Tensor:
        """fp32 [B, K, D, h, w].

        labels: uint8 [B, D, h, w], mixed; signal: fp32 [B], their share of true labels; class_id: int64 [B].
        Raises UserError where the labels are not of the model's shape or a class id is out of its range.
        """
        logits = self.final_layer.logits(self.hidden(labels, signal, class_id))
        grid = self.config.grid
        return logits.unflatten(0, (-1, grid, grid)).permute(0, 3, 4, 1, 2)

    def forward(self, labels: torch.Tensor, signal: torch.Tensor, class_id: torch.Tensor) -> torch.Tensor:
        """Scores [P, D, K] or [P, D], as `FinalLayer.scores` gives them; arguments as in `logits`."""
        return self.final_layer.scores(self.hidden(labels, signal, class_id))

    def loss(self, labels: torch.Tensor, signal: torch.Tensor, class_id: torch.Tensor,
             targets: torch.Tensor) -> torch.Tensor:
        """fp32 scalar: cross entropy of the true labels `targets` (uint8 [B, D, h, w]), mean over all of them."""
        return F.cross_entropy(self.logits(labels, signal, class_id), targets.long())

    def _rotary_tables(self, in_front: int) -> tuple[torch.Tensor, torch.Tensor]:
        key = (self.device, in_front)
        if key not in self._rotary:
            with torch.inference_mode(False):  # a later call may need gradients
                tables = rotary_tables(self.config.grid, self.config.head_size, in_front)
                self._rotary[key] = tuple(table.to(self.device) for table in tables)
        return self._rotary[key]

    def _check(self, labels: torch.Tensor, class_id: torch.Tensor) -> None:
        config = self.config
        if tuple(labels.shape[1:]) != (config.label_channels, config.grid, config.grid):
            raise UserError(f"labels are {list(labels.shape)}, but this model takes "
                            f"[images, {config.label_channels}, {config.grid}, {config.grid}]")
        if class_id.device.type == "cpu" and len(class_id) and not (
                0 <= int(class_id.min()) and int(class_id.max()) <= config.null_class):
            raise UserError(f"class ids lie in {int(class_id.min())} .. {int(class_id.max())}, but this model knows "
                            f"0 .. {config.num_classes - 1}, and {config.null_class} for no class")

"""The shape of a dense transformer: what it holds, and how missing fields are found from its parameter count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from grn_scale.errors import ConfigError

GPT3_SIZES = {0.125: (12, 768), 0.35: (24, 1024), 0.76: (24, 1536), 1.3: (24, 2048), 2.7: (32, 2560), 6.7: (32, 4096),
              13.0: (40, 5140), 175.0: (96, 12288)}
"""Billions of parameters -> layers and hidden size (Brown et al. 2020, arXiv 2005.14165, table 2.1)."""
ROUNDED = 0.03
"""Share by which a stated parameter count is rounded, and counted differently by different people."""


@dataclass(frozen=True)
class Shape:
    """A dense transformer. `vocab` 0: it has neither embedding nor head of note, as a diffusion transformer."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    gated: bool
    vocab: int
    tied: bool
    causal: bool
    sequence: int
    cross_attention: bool = False
    """Each layer also attends to a text (its length is small beside the sequence's)."""
    held_beyond: float = 0.0
    """Parameters that are held and no token of the sequence is multiplied with: a second stream, modulation."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "kv_heads", "ffn", "sequence"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} heads do not divide into {self.kv_heads} key-value heads")

    @property
    def head_size(self) -> float:
        return self.hidden / self.heads

    @property
    def kv_width(self) -> float:
        """Width of the keys, or of the values."""
        return self.head_size * self.kv_heads

    @property
    def layer_weights(self) -> float:
        """Weights of a layer's matrix products: each token meets them once."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_width
        cross = 2 * self.hidden**2 if self.cross_attention else 0
        return attention + cross + (3 if self.gated else 2) * self.hidden * self.ffn

    @property
    def layer_parameters(self) -> float:
        """With the keys and values of the text, and two norms."""
        text = 2 * self.hidden**2 if self.cross_attention else 0
        return self.layer_weights + text + 2 * self.hidden + self.held_beyond / self.layers

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> float:
        """Count of the whole model."""
        return self.layers * self.layer_parameters + self.embedding * (1 if self.tied else 2) + self.hidden


def complete(shape: Shape, parameters: float | None, known: frozenset[str]) -> tuple[Shape, dict[str, str]]:
    """The shape with what is not `known` among ffn, gated, kv_heads and tied set to the convention whose parameter
    count is nearest to `parameters`; and field -> reason for each.

    Conventions, in the order in which they are taken where the count does not tell: a plain MLP of 4 hidden sizes
    (GPT-3), a gated one of 8/3 (Llama) and of 3.5 with 8 key-value heads (Llama 3). What `parameters` has beyond the
    best of them by more than 3 % becomes `held_beyond`.
    """
    widths = [(False, shape.ffn), (True, shape.ffn)] if "ffn" in known else [
        (False, 4 * shape.hidden), (True, -(-8 * shape.hidden // 3) // 256 * 256 or 256), (True, 7 * shape.hidden // 2)]
    if "kv_heads" in known and shape.kv_heads < shape.heads:
        widths.sort(key=lambda width: not width[0])
    groups = [shape.kv_heads] if "kv_heads" in known else [shape.heads] + [8] * (
        shape.heads > 8 and shape.heads % 8 == 0 and "ffn" not in known)
    ties = [shape.tied] if "tied" in known or not shape.vocab else [False, True]
    found = [replace(shape, ffn=ffn, gated=gated, kv_heads=kv_heads, tied=tied)
             for (gated, ffn), kv_heads, tied in product(widths, groups, ties)]
    reason = "convention of GPT-3"
    if parameters:
        found.sort(key=lambda each: max(ROUNDED, abs(each.parameters / parameters - 1)))
        reason = f"the convention nearest to {parameters / 1e9:.4g} billion parameters"
        rest = parameters - found[0].parameters
        if rest > ROUNDED * parameters:
            found[0] = replace(found[0], held_beyond=rest)
    best = found[0]
    reasons = {name: reason for name in ("ffn", "gated", "kv_heads", "tied") if name not in known}
    if best.held_beyond:
        reasons["held_beyond"] = "stated parameters that the layers do not have: held, but not multiplied"
    return best, reasons


def gpt3_size(parameters: float) -> tuple[int, int] | None:
    """Layers and hidden size of the GPT-3 model with that many parameters, 3 % more or less; None where none has."""
    near = min(GPT3_SIZES, key=lambda size: abs(size * 1e9 - parameters))
    return GPT3_SIZES[near] if abs(near * 1e9 / parameters - 1) < 0.03 else None

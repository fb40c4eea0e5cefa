"""FLOPs of a dense transformer's training step, as the hardware does them and as sources count them.

A multiply and an add are two. Of each matrix product the backward pass makes two (Narayanan et al. 2021,
arXiv 2104.04473, appendix; Korthikanti et al. 2022, arXiv 2205.05198, appendix A).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grn_scale.planning.shape import Shape

TEXT_TOKENS = 512
"""Of the text that cross-attention meets, as video models have (Wan, arXiv 2503.20314, section 4.2.1)."""


_NEGATED = re.compile(r"\b(un|not?|non|never|without)[- ]?(?:\w+[- ])?(halv\w+|half|hardware|hfu|recomput\w+)|"
                      r"\bexclud\w+ (?:\w+ )?recomput\w+|hardware peak")
_HALVED = re.compile(r"halv|\bhalf\b(?!.precision)|divided by (2|two)\b")
_HARDWARE = re.compile(r"hardware|\bhfu\b|recomput")
_NO_ATTENTION = re.compile(r"no (visible )?quadratic|no attention\b|(exclud|ignor|neglect)\w* (the )?(self-)?attention|"
                           r"without (the )?(self-)?attention|attention (term )?(is )?(not counted|excluded|ignored)")
_PARAMETERS = re.compile(r"\b6 ?[*x\u00b7]? ?(s ?\* ?)?n( ?[*x\u00b7]? ?d)?\b|\b2\*n\*s")


@dataclass(frozen=True)
class Convention:
    """How a source counts the FLOPs that it divides by the time."""

    halved: bool = False
    """Causal attention counts half."""
    hardware: bool = False
    """Recomputed layers count again."""
    quadratic: bool = True
    """Attention counts at all."""
    embedding: bool = False
    """All parameters count 6, those of the embedding too."""

    def __str__(self) -> str:
        parts = ["hardware FLOPs with the recomputed layers" if self.hardware else "model FLOPs",
                 "6 for each parameter" if self.embedding else "6 for each weight of layers and head"]
        parts.append("attention " + ("halved where causal" if self.halved else "whole") if self.quadratic
                     else "no attention")
        return ", ".join(parts)


def read_convention(text: str | None, rate: bool = False) -> tuple[Convention, str | None]:
    """The convention that a source's own words describe; and where they do not, the reason of the one assumed.

    rate: it prints FLOP/s, not only a share of the peak.
    """
    usual = Convention(halved=not rate), (
        "convention not stated: model FLOPs with whole attention, as most that print FLOP/s count (Megatron-LM's "
        "formula)" if rate else
        "convention not stated: model FLOPs with causal attention halved, the count that no kernel can exceed")
    low = (text or "").lower()
    plain = _NEGATED.sub("", low)
    embedding = _PARAMETERS.search(low) is not None
    only = embedding and "attention" not in low and "+" not in low
    found = Convention(halved=_HALVED.search(plain) is not None, hardware=_HARDWARE.search(plain) is not None,
                       quadratic=not only and _NO_ATTENTION.search(low) is None, embedding=embedding)
    known = plain != low or found != Convention() or re.search("model flop|megatron|whole|full", low)
    return (found, None) if known else usual


def attention_forward(shape: Shape) -> float:
    """Of a sequence in one layer, un-halved: scores and weighted values, 4 s^2 h; and those of the text."""
    cross = TEXT_TOKENS if shape.cross_attention else 0
    return 4 * shape.sequence * shape.hidden * (shape.sequence + cross)


def counted(shape: Shape, convention: Convention, recompute_share: float = 1.0) -> float:
    """FLOPs of a sequence, forward and backward, as the source counts them.

    recompute_share: of the layers, how many are computed again, for hardware FLOPs.
    """
    linear = shape.layers * shape.layer_weights
    head = float(shape.embedding)
    if convention.embedding:
        linear, head = shape.parameters - shape.held_beyond, 0.0
    layers = 6 * linear * shape.sequence
    if convention.quadratic:
        half = 0.5 if convention.halved and shape.causal else 1.0
        layers += 3 * half * shape.layers * attention_forward(shape)
    again = 1 + recompute_share / 3 if convention.hardware else 1.0
    return layers * again + 6 * head * shape.sequence

"""The values that pass from data to model: planned draws, packs of them, and samples as read.

Legend: V visual tokens, P predicted visual tokens, T text tokens, N samples of a pack, S token budget,
D labels a token, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TASKS = ("T2I", "T2V", "I2V")


@dataclass(frozen=True)
class Draw:
    """One visit of one sample, as the plan decides it from the index alone."""

    index: int
    """Global draw index: names this visit in every keyed random choice."""
    key: str
    """Key of the video sample."""
    row: int
    """Row of its dataset's index, which the sample's bytes are found by."""
    thw: tuple[int, int, int]
    """Latent frames, height, width."""
    ratio_key: float
    """Height/width template of its bucket; spans the rotary positions."""
    task: str
    """T2I, T2V or I2V."""
    caption: int
    """Which of the sample's captions it is drawn with; -1: the empty one."""
    text_tokens: int
    """True length of the text entry."""
    dataset: int = 0
    """Which dataset of the mixture holds the sample."""
    class_id: int | None = None

    @property
    def visual_tokens(self) -> int:
        t, h, w = self.thw
        return t * h * w

    @property
    def predicted_tokens(self) -> int:
        """Visual tokens that are corrupted and scored: all but the first frame of an I2V draw."""
        t, h, w = self.thw
        return (t - 1 if self.task == "I2V" else t) * h * w

    @property
    def tokens(self) -> int:
        """Tokens in the packed sequence: visual, text, and the noise-level token."""
        return self.visual_tokens + self.text_tokens + 1


@dataclass(frozen=True)
class Pack:
    """Draws that share one sequence of `data.token_budget` tokens. Empty packs fill an epoch's last step."""

    epoch: int
    position: int
    """Place among the epoch's packs; -1 in an empty filler."""
    draws: tuple[Draw, ...]

    @property
    def tokens(self) -> int:
        return sum(draw.tokens for draw in self.draws)


@dataclass(frozen=True)
class Sample:
    """One draw with its bytes read."""

    draw: Draw
    bits: np.ndarray
    """uint8, np.packbits of bits [t, h, w, rounds * latent_channels]."""
    text_states: torch.Tensor | None
    """bf16 or fp32 [draw.text_tokens, text_hidden_size]; None until the text encoder has run over `text_ids`."""
    valid: bool = True
    """False for corrupt bytes: the slot stays, with loss weight 0 (bits and states are zeros)."""
    text_ids: tuple[int, ...] | None = None
    """Token ids, draw.text_tokens of them, where the dataset holds no states."""

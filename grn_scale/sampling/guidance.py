"""Conditional and unconditional prediction of several samples in one packed call of the network.

Legend: V visual tokens, P predicted tokens (those of a given first frame left out), U predicted tokens of the
guided samples, T text tokens, D labels a token, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from grn_scale.config.schema import ModelConfig
from grn_scale.model.sequence import SequenceLayout, lay_out, lay_out_beside_texts, ranges
from grn_scale.model.text_cache import TextCache
from grn_scale.model.transformer import GRN, KeyValueHook, ModelInput
from grn_scale.sampling.condition import Condition


@dataclass(frozen=True)
class Branches:
    """The packed sequence: the conditional branch of every sample, then the unconditional one of some."""

    guided: tuple[int, ...]
    """Samples that have an unconditional branch."""
    layout: SequenceLayout
    text_TC: torch.Tensor
    """Of no rows where the texts' keys and values are kept."""
    hooks: list[KeyValueHook] | None
    """Those of the kept texts, for `GRN.hidden`."""
    visual_source: torch.Tensor
    """int64: for each visual token of the sequence, the token of the samples it shows."""
    guided_rows: torch.Tensor
    """int64 [U]: predicted tokens of the guided samples among those of all samples."""


@dataclass(frozen=True)
class Prediction:
    """What the network says of every predicted token, sample by sample in natural order."""

    scores: torch.Tensor
    """Scores after guidance, as `Head` gives them: [P, D], or [P, D, K]."""
    conditional_PC: torch.Tensor
    """Hidden states that the head reads."""
    unconditional_UC: torch.Tensor


class GuidedNetwork:
    """The network for a fixed list of samples. Layout and texts are built once and serve every step."""

    def __init__(self, model: GRN, conditions: Sequence[Condition], texts: TextCache | None = None) -> None:
        """texts: with layout v1, a cache of samples before these (by default an empty one); it keeps those of these."""
        self.model = model
        self._texts = TextCache(model) if texts is None and model.config.layout == "v1" else texts
        if self._texts is not None:
            self._texts.keep([text for c in conditions for text in (c.text_states, c.negative_text_states)
                              if text is not None])
        self.conditions = tuple(conditions)
        self.device = model.word_embed.weight.device
        grids = [c.grid(c.text_states) for c in self.conditions]
        self.visual_counts = [grid.visual_tokens for grid in grids]
        self.predicted_counts = [grid.predicted_tokens for grid in grids]
        self.sample_P = _repeat(self.predicted_counts).to(self.device)
        """int64 [P] sample of each predicted token."""
        stops = torch.tensor(self.visual_counts).cumsum(0).tolist()
        self.predicted = ranges([stop - p for stop, p in zip(stops, self.predicted_counts)],
                                self.predicted_counts).to(self.device)
        """int64 [P] the visual tokens that are predicted."""
        self._visual_VD = _given_labels(self.conditions, model.config, sum(self.visual_counts)).to(self.device)
        self._branches: Branches | None = None

    def __call__(self, mixed_PD: torch.Tensor, shares: Sequence[float], guidance: Sequence[float],
                 always_both: bool = False) -> Prediction:
        """Prediction for the map `mixed_PD` (uint8), of which the share shares[n] of sample n are predictions.

        A sample whose guidance is 1 has no unconditional branch, unless `always_both`.
        """
        guided = tuple(n for n, g in enumerate(guidance) if always_both or g != 1.0)
        if self._branches is None or self._branches.guided != guided:
            self._branches = self._pack(guided)
        branches = self._branches
        visual = self._visual_VD.index_copy(0, self.predicted, mixed_PD)
        level = torch.tensor([*shares, *(shares[n] for n in guided)], dtype=torch.float32, device=self.device)
        hidden = self.model.hidden(ModelInput(
            branches.layout, visual.index_select(0, branches.visual_source), branches.text_TC, level), branches.hooks)
        scores = self.model.head(hidden)
        count = len(self.predicted)
        conditional, unconditional = scores[:count], scores[count:]
        if guided:
            weight_N = torch.tensor(guidance, dtype=torch.float32, device=self.device)
            weight = weight_N[self.sample_P[branches.guided_rows]].view(-1, *[1] * (scores.dim() - 1))
            asked = conditional[branches.guided_rows]
            # At weight 1 the formula gives the conditional scores up to rounding only.
            mixed = torch.where(weight == 1, asked, unconditional + weight * (asked - unconditional))
            conditional = conditional.index_copy(0, branches.guided_rows, mixed)
        return Prediction(conditional, hidden[:count], hidden[count:])

    def _pack(self, guided: tuple[int, ...]) -> Branches:
        texts = [c.text_states for c in self.conditions] + [self.conditions[n].negative_text_states for n in guided]
        owners = [*range(len(self.conditions)), *guided]
        config = self.model.config
        grids = [self.conditions[n].grid(text) for n, text in zip(owners, texts)]
        if self._texts is not None:
            layout = lay_out_beside_texts(grids, self._texts.starts(texts), config.head_size)
            text, hooks = torch.zeros(0, config.text_hidden_size, device=self.device), self._texts.hooks()
        else:
            layout = lay_out(grids, config.layout, config.head_size)
            text, hooks = torch.cat([text.to(self.device) for text in texts]), None
        visual = _places(self.visual_counts, owners)
        predicted = _places(self.predicted_counts, guided)
        return Branches(guided, layout.to(self.device), text, hooks, visual.to(self.device),
                        predicted.to(self.device))


def _given_labels(conditions: Sequence[Condition], config: ModelConfig, tokens: int) -> torch.Tensor:
    """uint8 [V, D]: the given first frames in their places, 0 elsewhere."""
    visual = torch.zeros(tokens, config.label_channels, dtype=torch.uint8)
    start = 0
    for condition in conditions:
        t, h, w = condition.thw
        if condition.first_frame_labels is not None:
            visual[start:start + h * w] = condition.first_frame_labels.flatten(1).t().cpu()
        start += t * h * w
    return visual


def _repeat(counts: Sequence[int]) -> torch.Tensor:
    """int64: number n, counts[n] times, for each n."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _places(counts: Sequence[int], owners: Sequence[int]) -> torch.Tensor:
    """int64: the places of each owner's items, where the items of all stand in order, counts[n] of owner n."""
    stops = torch.tensor(counts).cumsum(0).tolist()
    return ranges([stops[n] - counts[n] for n in owners], [counts[n] for n in owners])

"""Keys and values of texts, kept from one refinement step to the next.

Under layout v1 text tokens see text alone and no noise level, so in every layer their keys and values are the same at
each step: they are computed once, and a step then runs visual and level rows only.

Legend: R rows of all texts held, T text tokens to be computed, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grn_scale.model.sequence import lay_out_texts, ranges
from grn_scale.model.transformer import GRN, KeyValueHook, ModelInput


class TextCache:
    """Keys and values of the texts that are in use, each text once, layer by layer, on the model's device.

    A text is the tensor [n, text_hidden_size] itself: samples that share the tensor share its rows, equal tensors do
    not. Memory is 2 * layers * hidden_size numbers of the model's dtype for each text token held: in bf16 0.26 MB for
    grn_2b and 0.59 MB for grn_8b, so 0.3 GB for a text of 512 tokens in grn_8b. Call `keep` with the samples in flight,
    and it never holds more than their texts.
    """

    def __init__(self, model: GRN) -> None:
        if model.config.layout != "v1":
            raise ValueError(f"texts of layout {model.config.layout} depend on the noise: nothing can be kept")
        self.model = model
        self._layers = [_Layer(model) for _ in model.blocks()]
        self._texts: dict[int, torch.Tensor] = {}
        """By identity, in the order of their rows; holding the tensor keeps its identity from being used again."""

    def keep(self, texts: Sequence[torch.Tensor]) -> None:
        """Forget all texts but these."""
        kept = {id(text) for text in texts}
        if self._texts.keys() <= kept:
            return
        starts = self._starts()
        stay = {key: text for key, text in self._texts.items() if key in kept}
        rows = ranges([starts[key] for key in stay], [len(text) for text in stay.values()])
        for layer in self._layers:
            layer.select(rows.to(layer.keys.device))
        self._texts = stay

    def starts(self, texts: Sequence[torch.Tensor]) -> list[int]:
        """First row of each text in what `hooks` append, after computing those texts that are not held yet."""
        self._compute(list({id(text): text for text in texts if id(text) not in self._texts}.values()))
        starts = self._starts()
        return [starts[id(text)] for text in texts]

    def hooks(self) -> list[KeyValueHook]:
        """For `GRN.hidden`: attention then reads the texts' rows behind those of the sequence."""
        return [layer.extend for layer in self._layers]

    def _starts(self) -> dict[int, int]:
        starts, row = {}, 0
        for key, text in self._texts.items():
            starts[key] = row
            row += len(text)
        return starts

    def _compute(self, texts: Sequence[torch.Tensor]) -> None:
        if not texts:
            return
        # In the order of their rows, which `lay_out_texts` sorts by length.
        texts = sorted(texts, key=len)
        config, device = self.model.config, self.model.word_embed.weight.device
        layout = lay_out_texts([len(text) for text in texts], config.head_size).to(device)
        no_labels = torch.zeros(0, config.label_channels, dtype=torch.uint8, device=device)
        no_levels = torch.zeros(0, device=device)
        tokens_TC = torch.cat([text.to(device) for text in texts])
        self.model.hidden(ModelInput(layout, no_labels, tokens_TC, no_levels), [layer.add for layer in self._layers])
        self._texts |= {id(text): text for text in texts}


class _Layer:
    """Rows [R, H, E] of one layer."""

    def __init__(self, model: GRN) -> None:
        shape = (0, model.config.num_heads, model.config.head_size)
        self.keys = torch.empty(shape, dtype=model.dtype, device=model.word_embed.weight.device)
        self.values = self.keys

    def add(self, k_THE: torch.Tensor, v_THE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hook of the texts' own pass: keeps their rows, and they see themselves."""
        self.keys, self.values = torch.cat((self.keys, k_THE)), torch.cat((self.values, v_THE))
        return k_THE, v_THE

    def extend(self, k_SHE: torch.Tensor, v_SHE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hook of a refinement step: the sequence's rows, then the texts'."""
        return torch.cat((k_SHE, self.keys)), torch.cat((v_SHE, self.values))

    def select(self, rows: torch.Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

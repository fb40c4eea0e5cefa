"""The text encoder in training: which processes share its weights, and which of them encodes what.

Weights are shared by the processes of a node, so that they pass over its fast links only. The processes that hold one
copy of the model between them have the same texts: each encodes a part, and all get the states of all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from grn_scale.parallel import groups

if TYPE_CHECKING:
    from grn_scale.tokenizer.text import IdsEncoder


def weights_group() -> dist.ProcessGroup:
    """The processes this one shares the encoder's weights with: those of its node, or all where nodes have one each.

    All processes of the job call it together.
    """
    world = dist.get_world_size()
    sizes = set(groups.gather_objects(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    size = min(sizes)
    if len(sizes) > 1 or size == 1 or size >= world or world % size:
        return dist.group.WORLD
    return dist.new_subgroups(size, timeout=groups.TIMEOUT)[0]


class DividedTextEncoder:
    """A text encoder over texts that all processes of this copy of the model have: they divide the work."""

    def __init__(self, encoder: IdsEncoder) -> None:
        from megatron.core import parallel_state

        self._encoder = encoder
        self._group = parallel_state.get_model_parallel_group()
        self.hidden_size = encoder.hidden_size
        self.device = encoder.device

    def encode_ids(self, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """States of the token ids of each text: bf16 [n, hidden_size] on the device.

        A collective of all processes that share the weights; those of one copy of the model give the same texts.
        """
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        # Neighbours in length go to different processes, which makes their parts about equal.
        different = sorted({tuple(text) for text in texts}, key=lambda text: (len(text), text))
        parts = [different[part::size] for part in range(size)]
        states = self._encoder.encode_ids(parts[rank])
        if size > 1 and different:
            states = self._exchange(states, [[len(text) for text in part] for part in parts])
            different = [text for part in parts for text in part]
        known = dict(zip(different, states))
        return [known[tuple(text)] for text in texts]

    def _exchange(self, states: list[torch.Tensor], lengths: list[list[int]]) -> list[torch.Tensor]:
        """The states of every process, in rank order; lengths: tokens of each text of each process."""
        longest = max(map(sum, lengths))
        own = torch.zeros(longest, self.hidden_size, dtype=torch.bfloat16, device=self.device)
        if states:
            torch.cat(states, out=own[: sum(map(len, states))])
        every = own.new_empty(len(lengths) * longest, self.hidden_size)
        # As bytes: not every backend moves bf16.
        dist.all_gather_into_tensor(every.view(torch.uint8), own.view(torch.uint8), group=self._group)
        found = []
        for part, count in zip(every.split(longest), lengths):
            found.extend(part[: sum(count)].split(count) if count else [])
        return found

"""The frozen UMT5 encoder shared among processes: each holds a slice of every layer, none ever holds them all.

A layer is put together from its slices (torch's FSDP2) while the one before it runs, is run on all texts of the call,
and is taken apart again: one pass over the weights a call, however many texts and lengths there are, and two whole
layers at a time. A process without texts joins in that pass. The embedding table stays in its file, mapped into memory
once a machine; only the rows of the texts' ids are read.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from grn_scale.errors import UserError
from grn_scale.tokenizer.text import BATCH_TEXTS, equal_length_batches, read_text_config, weight_files

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the one embedding table; a file has either or both."""


class ShardedTextEncoder:
    """A UMT5 encoder cut among the processes of a group, each of which reads only its slice of every tensor."""

    def __init__(self, folder: str | Path, group: ProcessGroup, device: torch.device):
        """Every process of `group` makes one, from the same Hugging Face folder.

        UserError where the folder's weights are not those of a UMT5 encoder.
        """
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard
        from transformers.models.umt5.modeling_umt5 import UMT5Block, UMT5LayerNorm

        folder = Path(folder)
        config = read_text_config(folder)
        config.is_decoder, config._attn_implementation = False, "sdpa"
        weights = _Weights(folder)
        self.hidden_size: int = config.d_model
        self.device = device
        self._embedding = weights.find(*EMBEDDINGS)
        dtype = config.dtype or weights.rows(self._embedding, 0, 1).dtype
        self._weights, self._dtype = weights, dtype
        mesh = DeviceMesh.from_group(group, device.type)
        self._blocks = []
        for number in range(config.num_layers):
            with torch.device("meta"):
                block = UMT5Block(config, layer_idx=number).to(dtype).eval().requires_grad_(False)
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
            block.to_empty(device=device)
            for name, parameter in block.named_parameters():
                _fill(parameter.to_local(), weights, f"encoder.block.{number}.{name}", parameter.shape, mesh)
            self._blocks.append(block)
        self._norm = UMT5LayerNorm(config.d_model, config.layer_norm_epsilon).to(device, dtype).requires_grad_(False)
        _fill(self._norm.weight, weights, "encoder.final_layer_norm.weight", self._norm.weight.shape)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weights this process holds between calls."""
        local = (parameter.to_local() for block in self._blocks for parameter in block.parameters())
        return sum(tensor.nbytes for tensor in (*local, self._norm.weight))

    @torch.no_grad()
    def encode_ids(self, texts: Sequence[Sequence[int]], batch: int = BATCH_TEXTS) -> list[torch.Tensor]:
        """States of the token ids of each text: bf16 [n, hidden_size] on the device, as `TextEncoder.encode_ids`.

        A collective: all processes of the group call it equally often, each with texts of its own, or none.
        """
        batches = equal_length_batches(texts, batch)
        hidden = [self._embed(together) for together in batches]
        gathering = self._blocks[0].unshard(async_op=True)
        for block, following in itertools.pairwise((*self._blocks, None)):
            gathering.wait()
            gathering = following.unshard(async_op=True) if following is not None else None
            hidden = [block(states) for states in hidden]
            block.reshard()
        states = {}
        for together, last in zip(batches, hidden):
            states.update(zip(together, self._norm(last).to(torch.bfloat16).unbind()))
        return [states[tuple(text)].clone() for text in texts]

    def _embed(self, together: list[tuple[int, ...]]) -> torch.Tensor:
        """Embeddings [texts, n, hidden_size] of texts of one length."""
        ids = torch.tensor(together)
        different, places = ids.unique(return_inverse=True)
        rows = torch.cat([self._weights.rows(self._embedding, row, row + 1) for row in different.tolist()])
        return rows.to(self._dtype)[places].to(self.device)


class _Weights:
    """Tensors of a folder's safetensors files, read by rows. The files stay mapped, not read."""

    def __init__(self, folder: Path):
        from safetensors import SafetensorError, safe_open

        self._folder = folder
        self._slices = {}
        with ExitStack() as opened:
            for file in weight_files(folder):
                try:
                    tensors = opened.enter_context(safe_open(file, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise UserError(f"text.encoder: {file} cannot be loaded: {error}") from error
                self._slices.update((name, tensors.get_slice(name)) for name in tensors.keys())
            self._files = opened.pop_all()

    def find(self, *names: str) -> str:
        """The first of `names` that is there. UserError for none."""
        for name in names:
            if name in self._slices:
                return name
        raise UserError(f"text.encoder: {self._folder} lacks weights of a UMT5 encoder: {names[0]}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[self.find(name)].get_shape())

    def rows(self, name: str, begin: int, end: int) -> torch.Tensor:
        """Rows [begin, end) of a tensor, on the CPU in the stored precision."""
        return self._slices[name][begin:end]


def _fill(local: torch.Tensor, weights: _Weights, name: str, shape: torch.Size, mesh: DeviceMesh | None = None) -> None:
    """Read this process's rows of tensor `name` into `local`: all without a mesh, else those that FSDP2 gives it, which
    cuts the first dimension as torch.chunk does."""
    stored = weights.shape(name)
    if stored != tuple(shape):
        raise UserError(f"text.encoder: {name} has shape {list(stored)}, but config.json says {list(shape)}")
    begin = 0 if mesh is None else min(mesh.get_local_rank() * -(-shape[0] // mesh.size()), shape[0])
    if local.numel():
        local.copy_(weights.rows(name, begin, begin + local.shape[0]))

"""One pipeline stage (or one of its virtual chunks): embedding, some layers, head, as far as they lie here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from grn_scale.config.schema import ModelConfig
from grn_scale.model.initialize import initial_tensor
from grn_scale.model.loss import LabelLoss, label_loss
from grn_scale.model.pack import PackedBatch
from grn_scale.model.transformer import NORM_EPS, InputEmbedding, binary_scores
from grn_scale.parallel.layers import LayerConfig, PackedSequence, layer_spec
from grn_scale.parallel.placement import Placement, head_placements, layer_placements, whole


class ParallelHead(torch.nn.Module):
    """The head on this rank's label channels; the loss needs no logits of other ranks."""

    def __init__(self, config: ModelConfig, transformer: LayerConfig) -> None:
        super().__init__()
        self.config, self.sequence_parallel = config, transformer.sequence_parallel
        self.entropy = transformer.kernels.cross_entropy
        self.tensor_size = parallel_state.get_tensor_model_parallel_world_size()
        self.channels = config.label_channels // self.tensor_size
        first = parallel_state.get_tensor_model_parallel_rank() * self.channels
        self.channel_slice = slice(first, first + self.channels)
        self.norm = torch.nn.Module()
        self.norm.weight = torch.nn.Parameter(torch.ones(config.hidden_size))
        self.proj = torch.nn.Linear(config.hidden_size, self.channels * config.classes)

    def forward(self, hidden_S1C: torch.Tensor, batch: PackedBatch) -> LabelLoss:
        norm_weight = self.norm.weight
        if self.tensor_size > 1:
            # each rank's gradient of the states and of the norm comes from its own label channels only
            norm_weight = copy_to_tensor_model_parallel_region(norm_weight)
            if self.sequence_parallel:
                hidden_S1C = gather_from_sequence_parallel_region(hidden_S1C, tensor_parallel_output_grad=True)
            else:
                hidden_S1C = copy_to_tensor_model_parallel_region(hidden_S1C)
        place = batch.input.part or batch.input.layout
        x_PC = hidden_S1C.squeeze(1).index_select(0, place.predicted_rows).float()
        x_PC = F.rms_norm(x_PC, x_PC.shape[-1:], norm_weight.float(), NORM_EPS)
        if self.config.classes == 2:
            scores = binary_scores(x_PC, self.proj.weight, self.proj.bias)
        else:
            scores = F.linear(x_PC, self.proj.weight.float(), self.proj.bias.float())
            scores = scores.unflatten(-1, (self.channels, self.config.classes))
        loss = label_loss(scores, batch.targets_PD[:, self.channel_slice], batch.sample_P, batch.label_weight_N,
                          self.entropy)
        if self.tensor_size == 1:
            return loss
        with torch.no_grad():
            sums = reduce_from_tensor_model_parallel_region(torch.stack((loss.sample_loss_N, loss.sample_correct_N)))
        return LabelLoss(reduce_from_tensor_model_parallel_region(loss.weighted), sums[0], sums[1])


class GRNStage(MegatronModule):
    """The interface megatron's schedules drive: `set_input_tensor`, then `forward(batch)`.

    forward returns hidden states [S, 1, C] of this process's rows (under sequence parallelism [S / TP, 1, C]), on the
    last stage a `LabelLoss`: under context parallelism the share of it that comes from these rows.
    """

    def __init__(self, config: ModelConfig, transformer: LayerConfig, vp_stage: int | None = None) -> None:
        super().__init__(config=transformer)
        self.model_config, self.vp_stage, self.model_type = config, vp_stage, ModelType.encoder_or_decoder
        self.is_first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        layers = get_num_layers_to_build(transformer, vp_stage)
        self.embedding = InputEmbedding(config).to(transformer.params_dtype) if self.is_first else None
        self.block = TransformerBlock(
            transformer, TransformerBlockSubmodules(layer_specs=[layer_spec()] * layers), post_layer_norm=False,
            pre_process=self.is_first, post_process=self.is_last, vp_stage=vp_stage)
        self.head = ParallelHead(config, transformer).to(transformer.params_dtype) if self.is_last else None
        self.placements = self._place()
        self.shapes = {name: tuple(p.shape) for name, p in self.named_parameters()}
        self.to(transformer.params_dtype)

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        self.block.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: PackedBatch) -> torch.Tensor | LabelLoss:
        hidden = None
        if self.is_first:
            hidden = self.embedding(batch.input, self.config.params_dtype).unsqueeze(1)
            if self.config.sequence_parallel:
                hidden = scatter_to_sequence_parallel_region(hidden)
        sequence = PackedSequence(batch.input.layout, batch.input.part)
        hidden = self.block(hidden, attention_mask=None, packed_seq_params=sequence)
        return self.head(hidden, batch) if self.is_last else hidden

    def _place(self) -> dict[str, Placement]:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        placements = {}
        if self.embedding is not None:
            placements |= {f"embedding.{n}": whole(n, tuple(p.shape)) for n, p in self.embedding.named_parameters()}
        for i, layer in enumerate(self.block.layers):
            # megatron counts layers from 1 over all stages
            pieces = layer_placements(self.model_config, layer.layer_number - 1, rank, size)
            placements |= {f"block.layers.{i}.{name}": placement for name, placement in pieces.items()}
        if self.head is not None:
            placements |= {f"head.{n}": p for n, p in head_placements(self.model_config, rank, size).items()}
        names = {name for name, _ in self.named_parameters()}
        if names != placements.keys():
            raise AssertionError(f"parameters without placement: {sorted(names ^ placements.keys())}")
        for name, parameter in self.named_parameters():
            # clipping counts a parameter on every tensor-parallel rank only if it says that it is cut over them
            placement = placements[name]
            parameter.tensor_model_parallel = placement.split_dim is not None and size > 1
            parameter.partition_dim = -1 if placement.split_dim is None else placement.split_dim
            parameter.partition_stride = 1
        return placements

    def initial_value(self, name: str, seed: int) -> torch.Tensor:
        """fp32 local tensor of a parameter, cut out of the global one that is drawn by its official name."""
        local = torch.empty(self.shapes[name])
        drawn: dict[str, torch.Tensor] = {}
        for piece in self.placements[name].pieces:
            if piece.name not in drawn:
                drawn[piece.name] = initial_tensor(piece.name, piece.global_shape, seed)
            local[piece.local_index] = drawn[piece.name][piece.global_index]
        return local

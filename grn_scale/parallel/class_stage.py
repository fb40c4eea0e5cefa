"""The class-to-image model as the training engine drives it: whole on every rank, plain data parallel."""

from __future__ import annotations

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer.transformer_config import TransformerConfig

from grn_scale.class_to_image.batch import ClassBatch, batch_loss
from grn_scale.class_to_image.initialize import initial_tensor
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.model.loss import LabelLoss
from grn_scale.parallel.placement import Placement, whole


class ClassStage(torch.nn.Module):
    """The interface of `stage.GRNStage` for a model that is cut nowhere: `forward(batch)` gives a `LabelLoss`."""

    def __init__(self, config: ClassModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        # megatron's schedule asks the model for its configuration; of the sizes in it nothing is built.
        self.config = TransformerConfig(
            num_layers=config.num_layers, hidden_size=config.hidden_size, num_attention_heads=config.num_heads,
            params_dtype=dtype, bf16=dtype == torch.bfloat16, pipeline_dtype=dtype, calculate_per_token_loss=True,
            perform_initialization=False, use_cpu_initialization=not torch.cuda.is_available())
        self.vp_stage, self.model_type = None, ModelType.encoder_or_decoder
        self.network = ClassGRN(config).to(dtype)
        self.placements: dict[str, Placement] = {
            f"network.{name}": whole(name, tuple(p.shape)) for name, p in self.network.named_parameters()}
        for parameter in self.parameters():
            # What clipping reads: held by every tensor-parallel rank, cut over none.
            parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = False, -1, 1

    def set_input_tensor(self, input_tensor: object) -> None:
        """Nothing: there is no stage before this one."""

    def forward(self, batch: ClassBatch) -> LabelLoss:
        return batch_loss(self.network, batch)

    def initial_value(self, name: str, seed: int) -> torch.Tensor:
        """fp32 tensor of a parameter of this stage, drawn by its official name."""
        piece = self.placements[name].pieces[0]
        return initial_tensor(piece.name, piece.global_shape, seed)

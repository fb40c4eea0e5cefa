"""The layer spec: megatron's own transformer layer with our norm and bidirectional packed attention.

Sequence parallelism and tensor parallelism leave each rank with a part of what a norm weight's gradient is the
sum of. That sum is taken inside autograd (`copy_to_tensor_model_parallel_region` in the forward), because
DeepSpeed's optimizers take each gradient as soon as it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from grn_scale.config.schema import ModelConfig, ParallelConfig
from grn_scale.model.attention import packed_attention
from grn_scale.model.sequence import SequenceLayout
from grn_scale.model.sequence_part import SequencePart
from grn_scale.model.transformer import NORM_EPS
from grn_scale.parallel.fused import Kernels
from grn_scale.parallel.ulysses import gather_rows, scatter_rows


@dataclass(frozen=True)
class PackedSequence:
    """The sequence layout on its way through megatron's layers, in the argument it has for packed sequences.

    The format "sbhd" keeps megatron from treating the layout as its own: rotation and attention are ours.
    """

    layout: SequenceLayout
    part: SequencePart | None
    """The rows of this process; None: all."""
    qkv_format: str = "sbhd"


@dataclass
class LayerConfig(TransformerConfig):
    """megatron's view of the model and the layout, and the kernels that our parts of a layer run."""

    kernels: Kernels | None = None


class ParallelRMSNorm(torch.nn.Module):
    """`grn_scale.model.transformer.RMSNorm` whose weight's gradient is summed over tensor-parallel ranks
    where each of them sees only a part of the rows or heads."""

    def __init__(self, config: LayerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.norm = eps, config.kernels.norm
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.sum_gradient = config.tensor_model_parallel_size > 1 and self.sees_a_part(config)

    def sees_a_part(self, config: LayerConfig) -> bool:
        return config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sum_gradient else self.weight
        return self.norm(x, weight, self.eps)


class LocalHeadsRMSNorm(ParallelRMSNorm):
    """Norm of queries or keys: each rank holds some of the heads."""

    def sees_a_part(self, config: LayerConfig) -> bool:
        return True


class PackedCoreAttention(torch.nn.Module):
    """Rotation in fp32 and attention inside each sample, on this rank's heads and the whole sequence.

    Under context parallelism this rank comes with its rows of all these heads, and attends with some heads of all rows.
    """

    def __init__(self, config: LayerConfig, layer_number: int, **_unused: object) -> None:
        super().__init__()
        self.kernels = config.kernels

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                attention_mask: torch.Tensor | None, attn_mask_type: AttnMaskType | None = None,
                attention_bias: torch.Tensor | None = None,
                packed_seq_params: PackedSequence | None = None) -> torch.Tensor:
        """[S, 1, heads, head_size] each -> [S, 1, heads * head_size]."""
        layout, part = packed_seq_params.layout, packed_seq_params.part
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        rotate, attention = self.kernels.rotate, self.kernels.attention
        if part is None:
            if parallel_state.get_context_parallel_world_size() > 1:
                raise AssertionError("under context parallelism a batch is assembled with its part of the rows")
            query, key = (rotate(x, layout.cos, layout.sin) for x in (query, key))
            out = packed_attention(query, key, value, layout, attention)
        else:
            group = parallel_state.get_context_parallel_group()
            query, key = (rotate(x, layout.cos[part.rows], layout.sin[part.rows]) for x in (query, key))
            out = packed_attention(*gather_rows(query, key, value, group), layout, attention)
            out = scatter_rows(out, value.shape[1], group)
        return out.flatten(1).unsqueeze(1)


def layer_spec() -> ModuleSpec:
    """One GRN block as megatron builds it."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ParallelRMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear, core_attention=PackedCoreAttention,
                    linear_proj=RowParallelLinear, q_layernorm=LocalHeadsRMSNorm, k_layernorm=LocalHeadsRMSNorm)),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ParallelRMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear,
                                                                 linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add))


def layer_config(model: ModelConfig, parallel: ParallelConfig, kernels: Kernels, dtype: torch.dtype) -> LayerConfig:
    """What the layers are built from."""
    cuda = torch.cuda.is_available()
    return LayerConfig(
        kernels=kernels,
        num_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
        num_query_groups=model.num_heads, kv_channels=model.head_size, ffn_hidden_size=model.ffn_hidden_size,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, normalization="RMSNorm",
        layernorm_epsilon=NORM_EPS, qk_layernorm=True, hidden_dropout=0.0, attention_dropout=0.0,
        params_dtype=dtype, bf16=dtype == torch.bfloat16, pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor, sequence_parallel=parallel.sequence and parallel.tensor > 1,
        pipeline_model_parallel_size=parallel.pipeline, context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_modules=list(parallel.recompute_modules) if parallel.recompute == "selective" else None,
        recompute_method="uniform" if parallel.recompute == "full" else None,
        recompute_num_layers=1 if parallel.recompute == "full" else None,
        # weights are drawn by name, and the loss is divided by one planned denominator
        perform_initialization=False, use_cpu_initialization=not cuda, calculate_per_token_loss=True,
        bias_activation_fusion=kernels.compiled, bias_dropout_fusion=False, apply_rope_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
        batch_p2p_comm=cuda, deallocate_pipeline_outputs=cuda)

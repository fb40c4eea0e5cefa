"""FLOPs against what torch counts while the networks run."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from grn_scale.class_to_image.flops import image_flops, image_hardware_flops
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.schema import ModelConfig, ParallelConfig
from grn_scale.model.sequence import Grid, lay_out
from grn_scale.model.transformer import GRN, ModelInput
from grn_scale.perf.flops import hardware_flops, model_flops

MODEL = ModelConfig(hidden_size=32, num_layers=3, num_heads=4, ffn_hidden_size=80, num_chunks=1, text_hidden_size=24,
                    latent_channels=3, rounds=2)
GRIDS = [Grid((1, 4, 4), 1.0, 5), Grid((3, 2, 4), 1.0, 7, first_frame=True)]
LENGTHS = [(g.visual_tokens, g.predicted_tokens, g.text_tokens, g.visual_tokens + g.text_tokens + 1) for g in GRIDS]
PLAIN = ParallelConfig()
PAIRS = sum(lengths[3] ** 2 for lengths in LENGTHS)


def counted(network: torch.nn.Module, *inputs) -> int:
    """Of the matrix products in forward and backward; attention as plain products, so that nothing is fused."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*inputs).sum().backward()
    return counter.get_total_flops()


def batch(model: ModelConfig, rows: int | None = None) -> ModelInput:
    layout = lay_out(GRIDS, model.layout, model.head_size, rows)
    return ModelInput(
        layout, torch.randint(0, 2, (len(layout.visual_rows), model.label_channels), dtype=torch.uint8),
        torch.randn(len(layout.text_rows), model.text_hidden_size), torch.rand(len(GRIDS)))


@pytest.mark.parametrize("changes", [{}, {"layout": "v1"}, {"label_form": "index"}])
def test_model_flops_are_what_torch_counts_without_padding(changes):
    model = replace(MODEL, **changes)
    assert model_flops(model, LENGTHS) == counted(GRN(model), batch(model))


def test_hardware_flops_are_what_torch_counts_with_padding_and_the_scores_of_fused_kernels():
    scores_again = 2 * MODEL.num_layers * MODEL.hidden_size * PAIRS
    assert hardware_flops(MODEL, PLAIN, LENGTHS, 128) == counted(GRN(MODEL), batch(MODEL, 128)) + scores_again
    tokens = sum(lengths[3] for lengths in LENGTHS)
    assert hardware_flops(MODEL, PLAIN, LENGTHS, tokens) == model_flops(MODEL, LENGTHS) + scores_again


@pytest.mark.parametrize(("parallel", "again"), [
    (ParallelConfig(recompute="selective"), 128 * 2 * 3 * 32 * 80),
    (ParallelConfig(recompute="selective", recompute_modules=("core_attn",)), 4 * 32 * PAIRS),
    (ParallelConfig(recompute="selective", recompute_modules=("core_attn", "mlp")),
     128 * 2 * 3 * 32 * 80 + 4 * 32 * PAIRS),
    (ParallelConfig(recompute="full"), 128 * 2 * (4 * 32 * 32 + 3 * 32 * 80) + 4 * 32 * PAIRS),
    (ParallelConfig(pipeline=4, context=2), 0),
])
def test_hardware_flops_count_what_is_computed_again(parallel, again):
    without = hardware_flops(MODEL, PLAIN, LENGTHS, 128)
    assert hardware_flops(MODEL, parallel, LENGTHS, 128) - without == MODEL.num_layers * again


def test_full_recompute_is_what_torch_counts_for_checkpointed_layers():
    network = GRN(MODEL)
    for block in network.blocks():
        block.forward = functools.partial(checkpoint.checkpoint, block.forward, use_reentrant=False)
    with checkpoint.set_checkpoint_early_stop(False):
        found = counted(network, batch(MODEL, 128))
    scores_again = 2 * MODEL.num_layers * MODEL.hidden_size * PAIRS
    assert hardware_flops(MODEL, ParallelConfig(recompute="full"), LENGTHS, 128) == found + scores_again


def test_every_tensor_parallel_rank_embeds_the_input_and_an_empty_pack_costs_its_rows():
    one, two = (hardware_flops(MODEL, ParallelConfig(tensor=size), LENGTHS, 128) for size in (1, 2))
    assert 0 < two - one < 0.1 * one
    empty = hardware_flops(MODEL, PLAIN, LENGTHS, 256) - one
    assert empty == 128 * 6 * MODEL.num_layers * (4 * 32 * 32 + 3 * 32 * 80) == hardware_flops(MODEL, PLAIN, [], 128)


def test_image_flops_are_what_torch_counts():
    model = ClassModelConfig(hidden_size=32, num_layers=3, num_heads=4, bottleneck_size=12, grid=4,
                             latent_channels=3, rounds=2, label_form="bit", num_classes=5, in_context_start=1,
                             in_context_length=2)
    labels = torch.randint(0, 2, (2, model.label_channels, 4, 4), dtype=torch.uint8)
    found = counted(ClassGRN(model), labels, torch.rand(2), torch.tensor([1, 5]))
    assert found == 2 * image_flops(model)
    assert image_hardware_flops(model) - image_flops(model) == 2 * 32 * (16**2 + 2 * 18**2)

"""Names and shapes of the full-size official models (golden/checkpoint_layout.json), built without storage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.load import build
from grn_scale.config.schema import ModelConfig
from grn_scale.convert.kinds import CLASS, TEXT, TOKENIZER, UMT5, expected_shapes
from grn_scale.tokenizer.video import VideoTokenizerShape
from tests.helpers.golden import GOLDEN

OFFICIAL = json.loads((GOLDEN / "checkpoint_layout.json").read_text())["models"]
CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = {"grn2b_text_bit": "model/grn_2b.yaml", "grn0b_text_bit": "model/grn_0b.yaml",
           "grn_c2i_B_ind": "class/grn_b.yaml"}
"""Official model -> the configuration of ours that means it."""


def shipped(file: str, kind: type) -> ModelConfig | ClassModelConfig:
    return build(kind, yaml.safe_load((CONFIGS / file).read_text()), "model.")


def kind_and_config(name: str) -> tuple[str, object]:
    c = OFFICIAL[name]["config"]
    if "text" in name:
        return TEXT, shipped(SHIPPED[name], ModelConfig)
    if "c2i" in name:
        return CLASS, shipped(SHIPPED[name], ClassModelConfig)
    if "umt5" in name:
        return UMT5, c
    return TOKENIZER, VideoTokenizerShape(c["dim"], c["dec_dim"], c["latent_channels"], tuple(c["dim_mult"]),
                                          c["num_res_blocks"], tuple(map(bool, c["temperal_downsample"])))


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_are_those_of_the_official_file(name: str) -> None:
    shapes = expected_shapes(*kind_and_config(name))
    assert shapes == {tensor: tuple(shape) for tensor, shape in OFFICIAL[name]["tensors"].items()}
    assert len(shapes) == OFFICIAL[name]["num_tensors"]


@pytest.mark.parametrize("name", [name for name in OFFICIAL if "text" in name])
def test_shipped_configurations_of_text_models_are_the_official_ones(name: str) -> None:
    ours, c = shipped(SHIPPED[name], ModelConfig), OFFICIAL[name]["config"]
    assert (ours.num_heads, ours.num_chunks, ours.rounds, ours.label_form) == (
        c["num_heads"], c["block_chunks"], c["hbq_round"], c["refine_mode"])
    assert ours.ffn_hidden_size == 256 * round(c["mlp_ratio"] * ours.hidden_size / 256)


def test_the_8b_model_has_its_7_9_billion_parameters() -> None:
    shapes = expected_shapes(TEXT, shipped("model/grn_8b.yaml", ModelConfig))
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_890_859_520


@pytest.mark.parametrize("size, depth, width, heads, bottleneck, start", [
    ("b", 12, 768, 12, 128, 4), ("l", 24, 1024, 16, 128, 8), ("h", 32, 1280, 16, 256, 10),
    ("g", 40, 1664, 16, 256, 10)])
@pytest.mark.parametrize("suffix, form", [("", "index"), ("_bit", "bit")])
def test_shipped_configurations_of_class_models_are_the_official_ones(size, depth, width, heads, bottleneck, start,
                                                                      suffix, form) -> None:
    c = shipped(f"class/grn_{size}{suffix}.yaml", ClassModelConfig)
    assert (c.num_layers, c.hidden_size, c.num_heads, c.bottleneck_size, c.in_context_start) == (
        depth, width, heads, bottleneck, start)
    assert (c.in_context_length, c.grid, c.latent_channels, c.rounds, c.label_form) == (32, 16, 16, 4, form)
    assert c.ffn_hidden_size == int(int(4 * width) * 2 / 3)

"""The GRN text/video transformer as a file holds it: its configuration out of the tensors' shapes, and the shapes out
of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from grn_scale.config.load import build
from grn_scale.config.schema import ModelConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import GRN

Shapes = Mapping[str, tuple[int, ...]]

RELEASED_LAYOUTS = {"GRN_T2I_2B.pth": "v1", "GRN_T2V_2B.pth": "v1"}
"""Official files whose layout is known by their name."""
LAYOUT_VALUES = {"v1": {"task_tags": False, "end_fraction": 0.999}, "v2": {"task_tags": True, "end_fraction": 0.95}}
"""What weights of a layout were trained and are sampled with (GRN reference, sections 5 and 6)."""
OFFICIAL_INPUT = 512
"""One-hot input channels of all official models: 64 latent channels, 4 rounds, 2 classes a label."""


def text_config(shapes: Shapes, values: Mapping[str, Any], layout: str | None, file_name: str) -> ModelConfig:
    """Configuration of the model that the tensors belong to.

    values: keys of --model, which win over what the shapes tell; layout: --layout. ConfigError where neither the shapes
    nor these say all of it.
    """
    found: dict[str, Any] = _layout(values, layout, file_name)
    width = _shape(shapes, "word_embed.weight", 2)
    if width:
        found["hidden_size"] = width[0]
    text = _shape(shapes, "text_proj.weight", 2)
    if text:
        found["text_hidden_size"] = text[1]
    gate = _shape(shapes, "block_chunks.0.module.0.mlp.gate_proj.weight", 2)
    if gate:
        found["ffn_hidden_size"] = gate[0]
    chunks = _count(shapes, "block_chunks.{}.")
    layers = [_count(shapes, f"block_chunks.{chunk}.module.{{}}.") for chunk in range(chunks)]
    if chunks:
        found.update(num_chunks=chunks, num_layers=chunks * max(layers))
    head = _shape(shapes, "block_chunks.0.module.0.attn.q_norm.weight", 1)
    if head and head[0] and width:
        found["num_heads"] = width[0] // head[0]
    if {"latent_channels", "rounds"} <= values.keys():
        found["label_form"] = "bit"  # what a model configuration means where it does not name the form
    elif width and width[1] == OFFICIAL_INPUT and not {"label_form", "latent_channels", "rounds"} & values.keys():
        found.update(latent_channels=64, rounds=4, label_form="bit")
    found = {**found, **{name: value for name, value in values.items() if name != "layout"}}
    lacking = [name for name in ("hidden_size", "text_hidden_size", "ffn_hidden_size", "num_chunks", "num_heads",
                                 "label_form", "latent_channels", "rounds") if name not in found]
    if lacking:
        inputs = f" ({width[1]} input channels can be several)" if width else ""
        raise ConfigError(f"the tensors of {file_name} do not tell {', '.join(lacking)}{inputs}; name a model "
                          "configuration with --model FILE.yaml")
    return build(ModelConfig, found, "model.")


def _layout(values: Mapping[str, Any], layout: str | None, file_name: str) -> dict[str, Any]:
    """The layout that --layout, --model or the file name tells, with the task_tags and end_fraction that go with it."""
    stated = values.get("layout")
    if layout and stated and layout != stated:
        raise ConfigError(f"--layout says {layout}, but the --model file says {stated}; leave one of them out")
    layout = layout or stated or RELEASED_LAYOUTS.get(file_name)
    if layout is None:
        raise ConfigError(f"{file_name} does not say which layout its weights were trained with: give --layout v1 (the "
                          "released GRN_T2I_2B.pth and GRN_T2V_2B.pth) or --layout v2 (the newer training code); under "
                          "the wrong one the same weights give other results")
    return {"layout": layout, **LAYOUT_VALUES.get(layout, {})}


def text_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of the model."""
    with torch.device("meta"):
        model = GRN(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...] | None:
    shape = shapes.get(name)
    if shape is not None and len(shape) != dimensions:
        raise UserError(f"{name} is {list(shape)}, but must have {dimensions} dimensions")
    return shape


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of pattern.format(0), (1)... there are, told by the largest number that begins the name of a tensor.

    Up to half of them may be missing (they are named later); beyond that the number is capped, so that a made-up name
    cannot ask for a hundred thousand layers.
    """
    numbers, prefix = set(), pattern.partition("{}")[0]
    for name in shapes:
        if name.startswith(prefix):
            number = name.removeprefix(prefix).partition(".")[0]
            if number.isdecimal() and len(number) < 6:
                numbers.add(int(number))
    return min(max(numbers, default=-1) + 1, 2 * len(numbers))

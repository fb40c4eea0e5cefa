"""What a set of tensors is, told by their names, and which names and shapes it must then have."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from grn_scale.checkpoint.stored import StoredWeights
from grn_scale.config.class_schema import ClassModelConfig
from grn_scale.config.load import build, to_dict
from grn_scale.config.schema import ModelConfig
from grn_scale.convert import umt5
from grn_scale.convert.text_model import text_config, text_shapes
from grn_scale.errors import ConfigError, UserError

log = logging.getLogger(__name__)

TEXT, CLASS, TOKENIZER, UMT5 = "text", "class", "tokenizer", "umt5"
TITLES = {TEXT: "GRN text/video model", CLASS: "GRN class-to-image model", TOKENIZER: "video tokenizer",
          UMT5: "umT5 text encoder"}
CONFIG_CLASSES = {TEXT: ModelConfig, CLASS: ClassModelConfig}
CLASS_PREFIX = "net."
"""In front of every name in official class-to-image files; kept as part of the official name here."""
_MARKS = {
    TEXT: re.compile(r"(block_chunks\.|word_embed\.|text_proj\.|pt_embedder\.|head\.(norm|proj)\.)"),
    CLASS: re.compile(r"(net\.)?(x_embedder\.|y_embedder\.|t_embedder\.|final_layer\.|in_context_posemb|pos_embed$"
                      r"|blocks\.\d+\.(adaLN_modulation|mlp\.w12|attn\.qkv))"),
    TOKENIZER: re.compile(r"(encoder\.(conv1|downsamples|middle|head)\.|decoder\.(conv1|upsamples|middle|head)\."
                          r"|conv[12]\.)"),
    UMT5: re.compile(r"(token_embedding\.|blocks\.\d+\.(pos_embedding|ffn\.(gate|fc1|fc2))|shared\.weight"
                     r"|encoder\.(block\.|final_layer_norm))"),
}


def kind_of(names: Iterable[str]) -> str | None:
    """The kind whose names most of these are; None where they are of no kind."""
    names = list(names)
    counts = {kind: sum(bool(mark.match(name)) for name in names) for kind, mark in _MARKS.items()}
    kind = max(counts, key=lambda k: counts[k])
    return kind if counts[kind] else None


def official_names(kind: str | None, weights: StoredWeights) -> StoredWeights:
    """The same tensors under the names of official files."""
    def rename(name: str) -> str:
        if kind == UMT5:
            return umt5.official_name(name)
        if kind == CLASS and not name.startswith(CLASS_PREFIX):
            return CLASS_PREFIX + name
        return name

    renamed = {rename(name): value for name, value in weights.values_by_name.items()}
    if len(renamed) != len(weights):
        raise UserError("two tensors have the same official name: the file mixes two ways of naming")
    return StoredWeights(renamed)


def configuration(kind: str, weights: StoredWeights, carried: ModelConfig | ClassModelConfig | None,
                  values: Mapping[str, Any], layout: str | None, file_name: str) -> Any:
    """Configuration of the model that the tensors (official names) belong to, as `build` or the kind's module takes it.

    carried: the one that travelled with the weights, which wins; values: keys of --model; layout: --layout. ConfigError
    where these contradict each other, or do not tell all of it.
    """
    if kind not in CONFIG_CLASSES and (values or layout):
        raise ConfigError(f"--model and --layout describe a GRN model, but {file_name} is a {TITLES[kind]}")
    if kind == CLASS and layout:
        raise ConfigError("--layout belongs to text/video models; a class-to-image model has none")
    if carried is not None:
        stated = {**values, **({"layout": layout} if layout else {})}
        build(type(carried), {**to_dict(carried), **stated}, "model.")
        wrong = [f"{name} is {to_dict(carried)[name]}, not {value}" for name, value in stated.items()
                 if to_dict(carried)[name] != value]
        if wrong:
            raise ConfigError(f"{file_name} carries its model configuration, and there {'; '.join(wrong)}; leave "
                              "--model and --layout out")
        return carried
    if kind == TEXT:
        return text_config(weights.shapes, values, layout, file_name)
    if kind == CLASS:
        from grn_scale.class_to_image.load import infer_config

        build(ClassModelConfig, values, "model.")  # refuses unknown keys and wrong types
        return infer_config({name.removeprefix(CLASS_PREFIX): tensor for name, tensor in on_meta(weights).items()},
                            **values)
    if kind == TOKENIZER:
        from grn_scale.tokenizer.load import infer_shape

        return infer_shape(on_meta(weights), file_name)
    return umt5.umt5_config(weights.shapes)


def expected_shapes(kind: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of a model with this configuration, in the model's order."""
    if kind == TEXT:
        return text_shapes(config)
    if kind == UMT5:
        return umt5.umt5_shapes(config)
    with torch.device("meta"):
        if kind == CLASS:
            from grn_scale.class_to_image.model import ClassGRN

            state = {CLASS_PREFIX + name: tensor for name, tensor in ClassGRN(config).state_dict().items()}
        else:
            from grn_scale.tokenizer.video import VideoTokenizer

            state = VideoTokenizer(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check(weights: StoredWeights, expected: Mapping[str, tuple[int, ...]], path: Path, *,
          allow_missing: bool) -> StoredWeights:
    """The tensors in the model's order. UserError naming each that is missing, unexpected, misshapen or not floating
    point; with `allow_missing` the missing ones are logged instead, one by one."""
    values = weights.values_by_name
    missing = [name for name in expected if name not in values]
    problems = [] if allow_missing else [f"missing {name}" for name in missing]
    problems += [f"unexpected {name}" for name in sorted(values.keys() - expected.keys())]
    for name in expected.keys() & values.keys():
        if values[name].shape != expected[name]:
            problems.append(f"{name} is {list(values[name].shape)}, not {list(expected[name])}")
        elif not values[name].dtype.is_floating_point:
            problems.append(f"{name} is {values[name].dtype}, not floating point")
    if problems:
        hint = "" if allow_missing or not missing else "\n--allow-missing goes on without the missing ones"
        raise UserError(f"{path} does not fit the model:\n  " + "\n  ".join(sorted(problems)) + hint)
    for name in missing:
        log.warning("missing %s: what is written will lack it", name)
    return StoredWeights({name: values[name] for name in expected if name in values})


def on_meta(weights: StoredWeights) -> dict[str, torch.Tensor]:
    """Tensors that have shape and dtype, but no values."""
    return {name: torch.empty(value.shape, dtype=value.dtype, device="meta")
            for name, value in weights.values_by_name.items()}

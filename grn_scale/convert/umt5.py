"""The umT5 encoder: its official names, those of transformers' UMT5EncoderModel, and its configuration out of shapes.

Both classes compute the same (GRN reference, section 5), so converting is renaming.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from grn_scale.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]

_ENDS = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_OFFICIAL_ENDS = {theirs: ours for ours, theirs in _ENDS.items()}
_OFFICIAL_BLOCK = {theirs: ours for ours, theirs in _BLOCK.items()}
MAX_DISTANCE = 128
"""Tokens beyond which all distances share a bucket; no tensor tells it."""


def hf_name(official: str) -> str:
    """Name of an official tensor in transformers; a name that is none of the encoder's stays as it is."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", official)
    if block and block[2] in _BLOCK:
        return f"encoder.block.{block[1]}.{_BLOCK[block[2]]}"
    return _ENDS.get(official, official)


def official_name(name: str) -> str:
    """Official name of a tensor of transformers; a name that is none of the encoder's stays as it is."""
    block = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", name)
    if block and block[2] in _OFFICIAL_BLOCK:
        return f"blocks.{block[1]}.{_OFFICIAL_BLOCK[block[2]]}"
    return _OFFICIAL_ENDS.get(name, name)


def umt5_config(shapes: Shapes) -> dict[str, int]:
    """vocab, dim, dim_attn, dim_ffn, num_heads, num_layers, num_buckets; UserError where the tensors do not tell."""
    def shape(name: str) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != 2:
            raise UserError(f"this is no umT5 encoder: {name} is {list(shapes[name])}" if name in shapes else
                            f"this is no umT5 encoder: missing {name}")
        return shapes[name]

    numbers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d{1,5})\.", name))}
    vocab, dim = shape("token_embedding.weight")
    buckets, heads = shape("blocks.0.pos_embedding.embedding.weight")
    return {"vocab": vocab, "dim": dim, "dim_attn": shape("blocks.0.attn.q.weight")[0],
            "dim_ffn": shape("blocks.0.ffn.gate.0.weight")[0], "num_heads": heads, "num_layers": len(numbers),
            "num_buckets": buckets}


def umt5_shapes(config: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every tensor of the encoder."""
    dim, attn, ffn = config["dim"], config["dim_attn"], config["dim_ffn"]
    block = {"norm1.weight": (dim,), "norm2.weight": (dim,), "attn.o.weight": (dim, attn),
             **{f"attn.{part}.weight": (attn, dim) for part in "qkv"},
             "pos_embedding.embedding.weight": (config["num_buckets"], config["num_heads"]),
             "ffn.gate.0.weight": (ffn, dim), "ffn.fc1.weight": (ffn, dim), "ffn.fc2.weight": (dim, ffn)}
    blocks = {f"blocks.{i}.{name}": shape for i in range(config["num_layers"]) for name, shape in block.items()}
    return {"token_embedding.weight": (config["vocab"], dim), **blocks, "norm.weight": (dim,)}


def transformers_config(config: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """config.json of a UMT5EncoderModel; dtype as in "bfloat16"."""
    if not config["num_heads"] or config["dim_attn"] % config["num_heads"]:
        raise UserError(f"attention width {config['dim_attn']} does not divide into {config['num_heads']} heads")
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "dtype": dtype,
        "vocab_size": config["vocab"], "d_model": config["dim"], "d_ff": config["dim_ffn"],
        "d_kv": config["dim_attn"] // config["num_heads"], "num_heads": config["num_heads"],
        "num_layers": config["num_layers"], "num_decoder_layers": config["num_layers"],
        "relative_attention_num_buckets": config["num_buckets"], "relative_attention_max_distance": MAX_DISTANCE,
        "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06, "dropout_rate": 0.1,
        "is_encoder_decoder": False, "use_cache": False, "pad_token_id": 0, "eos_token_id": 1,
        "decoder_start_token_id": 0}

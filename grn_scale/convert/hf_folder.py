"""Hugging Face style folders: sharded safetensors with their index, config.json and a card, and whole pipelines."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grn_scale import __version__
from grn_scale.atomic import write_bytes, write_json
from grn_scale.checkpoint.index import DTYPE_NAMES
from grn_scale.checkpoint.stored import INDEX_SUFFIX, PIPELINE, StoredWeights
from grn_scale.checkpoint.tensor_file import write_tensor_file
from grn_scale.config.load import to_dict
from grn_scale.convert.kinds import CLASS, CLASS_PREFIX, TEXT, TITLES, UMT5
from grn_scale.convert.native import entries
from grn_scale.convert.umt5 import hf_name, transformers_config
from grn_scale.errors import UserError

SHARD_BYTES = 4 << 30
"""A shard is closed before the tensor that would make it larger."""
SPIECE = "spiece.model"
TOKENIZER_FILES = (SPIECE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PIECES_FOLDERS = (".", "umt5-xxl", "google/umt5-xxl", "../tokenizer")
"""Where the sentencepiece files lie, seen from the folder of the text encoder's weights."""
CLASS_NAMES = {TEXT: "GRN", CLASS: "ClassGRN", UMT5: "UMT5EncoderModel"}
LOADERS = {
    TEXT: "from grn_scale.model import load_model\n\nmodel = load_model(folder)",
    CLASS: "from grn_scale.class_to_image import load_model\n\nmodel = load_model(folder)",
    "tokenizer": "from grn_scale.tokenizer import load_tokenizer\n\ntokenizer = load_tokenizer(folder)",
    UMT5: "from transformers import UMT5EncoderModel\n\n"
          "encoder = UMT5EncoderModel.from_pretrained(folder, dtype=\"auto\")",
}


def write_folder(folder: Path, kind: str, weights: StoredWeights, config: Any, step: int | None,
                 shard_bytes: int | None = None) -> None:
    """Write one model (official names) as config.json, shards, index and README.md; tensors one at a time.

    umT5 gets transformers' names and configuration; the others keep the official names, class-to-image without its
    prefix.
    """
    folder.mkdir()
    rename: Callable[[str], str] = {UMT5: hf_name, CLASS: lambda name: name.removeprefix(CLASS_PREFIX)}.get(
        kind, lambda name: name)
    weights = StoredWeights({rename(name): value for name, value in weights.values_by_name.items()})
    shards = _shards(weights, shard_bytes or SHARD_BYTES)
    homes = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(folder / file, entries(shard), {"format": "pt"})
        homes.update(dict.fromkeys(shard, file))
    write_json(folder / f"model{INDEX_SUFFIX}", {
        "metadata": {"total_size": weights.bytes}, "weight_map": {name: homes[name] for name in sorted(homes)}})
    write_json(folder / "config.json", _config_json(kind, weights, config, step))
    write_bytes(folder / "README.md", _card(kind, weights, config, step).encode())


def _shards(weights: StoredWeights, limit: int) -> list[StoredWeights]:
    shards: list[dict] = [{}]
    size = 0
    for name, value in weights.values_by_name.items():
        if shards[-1] and size + value.bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.bytes
    return [StoredWeights(shard) for shard in shards]


def _config_json(kind: str, weights: StoredWeights, config: Any, step: int | None) -> dict[str, Any]:
    if kind == UMT5:
        largest = max(weights.values_by_name.values(), key=lambda value: value.bytes)
        return transformers_config(config, DTYPE_NAMES[largest.dtype])
    described = {"_class_name": CLASS_NAMES.get(kind, "VideoTokenizer"), "_grn_scale_version": __version__}
    if kind == "tokenizer":
        return {**described, "kind": "video_tokenizer", **asdict(config)}
    name = "class_to_image" if kind == CLASS else "text_to_video"
    return {**described, "kind": name, "step": step, "model": to_dict(config)}


def _card(kind: str, weights: StoredWeights, config: Any, step: int | None) -> str:
    dtypes = sorted({DTYPE_NAMES[value.dtype] for value in weights.values_by_name.values()})
    settings = config if isinstance(config, Mapping) else asdict(config)
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    library = "transformers" if kind == UMT5 else "grn_scale"
    trained = f"Training step {step}. " if step is not None else ""
    return f"""---
library_name: {library}
tags: [grn, {kind}]
---

# {TITLES[kind]}

{weights.parameters:,} parameters in {len(weights)} tensors ({', '.join(dtypes)}), {weights.bytes:,} bytes. {trained}
Converted by grn_scale {__version__}. The license is the one of the source weights.

| setting | value |
|---|---|
{rows}

```python
{LOADERS[kind]}
```
"""


def find_pieces(weights: Path) -> Path | None:
    """Folder with the sentencepiece model that belongs to a text encoder's weights (a file or a folder), or None."""
    base = weights if weights.is_dir() else weights.parent
    return next((base / name for name in PIECES_FOLDERS if (base / name / SPIECE).is_file()), None)


def copy_pieces(source: Path, target: Path) -> None:
    """Copy the tokenizer's files; what transformers needs beside the pieces is written where it is missing."""
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not (target / "tokenizer_config.json").exists():
        write_json(target / "tokenizer_config.json", {
            "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>",
            "unk_token": "<unk>", "model_max_length": 512})


def write_pipeline(folder: Path, parts: Mapping[str, Callable[[Path], None]], pieces: Path) -> None:
    """Write transformer/, vae/ and text_encoder/ (each by its function), tokenizer/ and model_index.json."""
    folder.mkdir()
    for name, write in parts.items():
        write(folder / name)
    copy_pieces(pieces, folder / "tokenizer")
    shutil.copyfile(pieces / SPIECE, folder / "text_encoder" / SPIECE)
    write_json(folder / PIPELINE, {
        "_class_name": "GRNPipeline", "_grn_scale_version": __version__, "transformer": ["grn_scale", "GRN"],
        "vae": ["grn_scale", "VideoTokenizer"], "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"]})
    write_bytes(folder / "README.md", _PIPELINE_CARD.encode())


def require_matching(transformer: Any, tokenizer: Any, encoder: Mapping[str, int]) -> None:
    """UserError unless the three models of a pipeline belong together."""
    if transformer.latent_channels != tokenizer.latent_channels:
        raise UserError(f"the model refines {transformer.latent_channels} latent channels, but --tokenizer has "
                        f"{tokenizer.latent_channels}; give the tokenizer it was trained with")
    if transformer.text_hidden_size != encoder["dim"]:
        raise UserError(f"the model reads text states of width {transformer.text_hidden_size}, but --text-encoder "
                        f"gives {encoder['dim']}; give the encoder it was trained with")


_PIPELINE_CARD = f"""---
library_name: grn_scale
tags: [grn, text-to-video, text-to-image]
---

# GRN pipeline

`transformer/`, `vae/` (the video tokenizer), `text_encoder/` and `tokenizer/` (umT5), converted by
grn_scale {__version__}. Each folder's card says what it holds. The licenses are those of the source weights.

```python
from grn_scale.sampling import GRNPipeline

pipeline = GRNPipeline.from_pretrained(folder)
```
"""

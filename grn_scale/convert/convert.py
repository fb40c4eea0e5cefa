"""Weights from one form into another: read, checked against the model they belong to, and written as a whole."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import partial_name, remove_leftovers, remove_partial
from grn_scale.checkpoint.index import DTYPE_NAMES
from grn_scale.checkpoint.stored import StoredValue, StoredWeights
from grn_scale.checkpoint.tensor_file import write_tensor_file
from grn_scale.config.load import to_dict
from grn_scale.convert import hf_folder, native
from grn_scale.convert.contents import EMA, HF, NATIVE, OFFICIAL, RAW, SAFETENSORS, Contents, open_contents
from grn_scale.convert.kinds import (
    CLASS,
    CLASS_PREFIX,
    TEXT,
    TITLES,
    TOKENIZER,
    UMT5,
    check,
    configuration,
    expected_shapes,
)
from grn_scale.convert.official import write_official
from grn_scale.errors import ConfigError, UserError

log = logging.getLogger(__name__)

BOTH = "both"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked of `convert`."""

    input: Path
    source: str
    """Form of the input: official, native, hf."""
    target: str
    """Form of the output, as above."""
    output: Path
    layout: str | None = None
    weights: str | None = None
    """raw, ema, both; None: all that the target holds, and the moving average where it holds one set."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the model configuration that the shapes do not tell."""
    dtype: str | None = None
    """fp32, bf16, fp16; None keeps every dtype."""
    allow_missing: bool = False
    tokenizer: Path | None = None
    text_encoder: Path | None = None


@dataclass(frozen=True)
class Checked:
    """Weights that fit their model."""

    kind: str
    config: Any
    sets: dict[str, StoredWeights]
    step: int | None


def convert(request: Request, partial: Path | None = None,
            may_publish: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write the output, complete or not at all, and return what was written: kind, weights, tensors, parameters...

    partial: path beside the output to write to before; by default one of this process's own, which the next conversion
    to this output removes where this one is killed. may_publish: called just before the output appears; what it raises
    ends the conversion without a trace.

    ConfigError for a request that contradicts itself or its input, UserError for what cannot be read, does not fit,
    or cannot be written. Inputs stay as they are. One tensor at a time is in memory.
    """
    if (request.tokenizer is None) != (request.text_encoder is None):
        raise ConfigError("a pipeline needs both --tokenizer FILE and --text-encoder FILE")
    if request.tokenizer is not None and request.target != HF:
        raise ConfigError("--tokenizer and --text-encoder belong to a pipeline folder: --to hf")
    contents = open_contents(request.input)
    if contents.form not in (request.source, SAFETENSORS):
        raise ConfigError(f"--from says {request.source}, but {request.input} is {contents.form}: "
                          f"--from {contents.form} reads it")
    checked = checked_contents(contents, request)
    write = _writer(checked, request)
    output = request.output.absolute()
    with _finished(output, partial or partial_name(output), may_publish) as path:
        write(path)
    return {
        "kind": checked.kind, "from": request.source, "to": request.target, "output": str(request.output),
        "weights": list(checked.sets), "step": checked.step,
        "tensors": sum(len(weights) for weights in checked.sets.values()),
        "parameters": sum(weights.parameters for weights in checked.sets.values()),
        "bytes": sum(weights.bytes for weights in checked.sets.values()),
        "dtypes": sorted({DTYPE_NAMES[v.dtype] for w in checked.sets.values() for v in w.values_by_name.values()}),
        "model": _plain(checked.config)}


def checked_contents(contents: Contents, request: Request) -> Checked:
    """The sets of weights that the target gets, each one compared with the model's names and shapes."""
    if contents.kind is None:
        raise UserError(f"{contents.path} holds tensors of no known model ({', '.join(TITLES.values())}): "
                        "`grn-scale inspect` lists them")
    sets = _choose(contents, request)
    config = configuration(contents.kind, next(iter(sets.values())), contents.config, request.model, request.layout,
                           request.input.name)
    expected = expected_shapes(contents.kind, config)
    sets = {name: _cast(check(weights, expected, contents.path, allow_missing=request.allow_missing), request.dtype)
            for name, weights in sets.items()}
    return Checked(contents.kind, config, sets, contents.step)


def _choose(contents: Contents, request: Request) -> dict[str, StoredWeights]:
    sets, wish = contents.sets, request.weights
    if wish in (RAW, EMA):
        if wish not in sets:
            there = " and ".join(sets) if len(sets) > 1 else "one set of weights only"
            raise UserError(f"--weights {wish}: {contents.path} holds {there}; leave --weights out to take what is "
                            "there")
        return {RAW: sets[wish]}
    several = {TEXT: (NATIVE,), CLASS: (NATIVE, OFFICIAL)}.get(contents.kind, ())
    if wish == BOTH:
        several = {TEXT: (NATIVE, OFFICIAL), CLASS: (NATIVE, OFFICIAL), TOKENIZER: (OFFICIAL,)}.get(contents.kind, ())
        if len(sets) < 2 or request.target not in several:
            raise UserError(f"--weights both: {contents.path} holds {' and '.join(sets)}, and in the form "
                            f"{request.target} a {TITLES[contents.kind]} holds "
                            f"{'both' if request.target in several else 'one'}")
    if len(sets) > 1 and request.target in several:
        return sets
    name = EMA if EMA in sets else next(iter(sets))
    if len(sets) > 1:
        log.info("taking the moving average of the weights; --weights raw takes those that were trained")
    return {RAW: sets[name]}


def _cast(weights: StoredWeights, dtype: str | None) -> StoredWeights:
    if dtype is None:
        return weights
    wanted = DTYPES[dtype]

    def cast(value: StoredValue) -> StoredValue:
        return StoredValue(wanted, value.shape, lambda: value.read().to(wanted))

    return StoredWeights({name: cast(value) for name, value in weights.values_by_name.items()})


def _writer(checked: Checked, request: Request) -> Callable[[Path], None]:
    """What writes the output into a path that does not exist yet."""
    single = next(iter(checked.sets.values()))
    if request.tokenizer is not None:
        return _pipeline_writer(checked, request)
    if request.target == OFFICIAL:
        return lambda path: write_official(path, checked.kind, checked.sets, checked.step)
    if request.target == NATIVE and checked.kind == TEXT:
        return lambda path: _write_run(path, checked, request)
    if request.target == NATIVE and checked.kind == CLASS:
        return lambda path: native.write_class_folder(path, checked.sets, to_dict(checked.config), CLASS_PREFIX)
    if request.target == NATIVE and checked.kind == TOKENIZER:
        return lambda path: write_tensor_file(path, native.entries(single), {"format": "pt"})
    pieces = hf_folder.find_pieces(request.input) if checked.kind == UMT5 else None
    if checked.kind == UMT5 and pieces is None:
        log.warning("no %s lies beside %s: put it into %s before the folder is used as text.encoder",
                    hf_folder.SPIECE, request.input, request.output)

    def write_folder(path: Path) -> None:
        hf_folder.write_folder(path, checked.kind, single, checked.config, checked.step)
        if pieces is not None:
            hf_folder.copy_pieces(pieces, path)

    return write_folder


def _write_run(path: Path, checked: Checked, request: Request) -> None:
    step = checked.step or 0
    native.write_checkpoint(path, step, checked.sets, {
        "step": step, "config": {"model": to_dict(checked.config)},
        "origin": {"file": request.input.name, "form": request.source, "weights": request.weights}})


def _pipeline_writer(checked: Checked, request: Request) -> Callable[[Path], None]:
    if checked.kind != TEXT:
        raise ConfigError(f"--tokenizer and --text-encoder complete a {TITLES[TEXT]}, but {request.input} is a "
                          f"{TITLES[checked.kind]}")
    parts = {"transformer": checked}
    for name, path, kind in (("vae", request.tokenizer, TOKENIZER), ("text_encoder", request.text_encoder, UMT5)):
        contents = open_contents(path)
        if contents.kind != kind:
            raise ConfigError(f"{path} is {TITLES.get(contents.kind, 'no model that is known')}, not a {TITLES[kind]}")
        parts[name] = checked_contents(contents, Request(path, contents.form, HF, request.output))
    hf_folder.require_matching(checked.config, parts["vae"].config, parts["text_encoder"].config)
    pieces = hf_folder.find_pieces(request.text_encoder)
    if pieces is None:
        raise UserError(f"no {hf_folder.SPIECE} lies beside {request.text_encoder} (or in umt5-xxl/ there); the "
                        "pipeline needs the sentencepiece model the encoder was trained with: put it there")

    def part_writer(part: Checked) -> Callable[[Path], None]:
        weights = next(iter(part.sets.values()))
        return lambda path: hf_folder.write_folder(path, part.kind, weights, part.config, part.step)

    return lambda path: hf_folder.write_pipeline(
        path, {name: part_writer(part) for name, part in parts.items()}, pieces)


@contextmanager
def _finished(output: Path, partial: Path, may_publish: Callable[[], None]):
    """`partial`, which becomes `output` when the block ends; after an error nothing of it is left."""
    try:
        _require_free(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output.parent, output.name)
        try:
            yield partial
            may_publish()
            _require_free(output)  # another conversion may have been quicker
            if partial.is_file() and output.is_dir():
                output.rmdir()
            os.rename(partial, output)
        except BaseException:  # whatever ends the conversion, also Ctrl-C: nothing half-written may stay
            remove_partial(partial)
            raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def is_free(output: Path) -> bool:
    """Whether a conversion may write there: nothing is there, or an empty folder."""
    return not output.exists() or output.is_dir() and not any(output.iterdir())


def _require_free(output: Path) -> None:
    if not is_free(output):
        raise UserError(f"--output: {output} exists already and is not overwritten; give another path")


def _plain(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)

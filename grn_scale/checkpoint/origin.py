"""The weights that a run starts from: of another run, or converted ones. Of the tensors only the index is read here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grn_scale.checkpoint import layout
from grn_scale.checkpoint.index import ChunkIndex, StoredChunk, StoredTensor, read_json
from grn_scale.checkpoint.ranks import Ranks
from grn_scale.checkpoint.stored import read_small_json, tensor_spans
from grn_scale.errors import ConfigError, UserError

SECTIONS = {"raw": "model", "ema": "ema"}
"""Set of weights -> section of a checkpoint."""
CLASS_KIND = "class_to_image"
CLASS_FILES = {"ema": "model.safetensors", "raw": "model_raw.safetensors", "ema2": "model_ema2.safetensors"}
"""Set of weights -> file of a class-to-image folder; the first is the one to sample with, and there may be no other."""


@dataclass(frozen=True)
class Origin:
    """Made by `find_origin`."""

    path: Path
    """Step folder, or folder of a converted class-to-image model; absolute."""
    weights: str
    """raw or ema."""
    folder: Path
    """Where the files of `index` lie."""
    index: ChunkIndex
    """The tensors, by official name."""
    state: dict[str, Any]
    """What was saved with them: config (at least config.model), and of a run step, dataset and origin."""

    @property
    def model(self) -> dict[str, Any]:
        """Keys of the model configuration they belong to."""
        return self.state["config"]["model"]

    def without(self, names: Collection[str]) -> Origin:
        """The same less some tensors."""
        return replace(self, index=replace(self.index, tensors={
            name: stored for name, stored in self.index.tensors.items() if name not in names}))

    def to_dict(self) -> dict[str, Any]:
        """JSON values for the state of a run that started from here; `origin` inside says where these came from."""
        return {"path": str(self.path), "step": self.state.get("step"), "weights": self.weights,
                "origin": self.state.get("origin")}


def check_origin(path: str, weights: str) -> None:
    """Refuse what `find_origin` would, as far as is seen without reading tensors; for one process alone."""
    source = _existing(path)
    if _is_class_folder(source):
        _of_class_folder(source, weights)
    elif layout.is_step_folder(source):
        _of_checkpoint(_verified(path, source, (), Ranks(alone=True)), weights)
    else:
        whole = [found.path for found in layout.scan(source) if not found.problem]
        if not whole:
            raise _nothing_at(path)
        _of_checkpoint(whole[0], weights)


def find_origin(path: str, weights: str, ranks: Ranks) -> Origin:
    """The weights ("raw" or "ema") at `path`, which is a run folder (its newest complete checkpoint), a step folder or
    what `grn-scale convert --to native` wrote. Of a checkpoint they are compared with their checksums; all ranks take
    part. ConfigError, naming init.from, where they are not there; UserError where they are damaged.
    """
    source = ranks.first(lambda: _existing(path))
    if ranks.first(lambda: _is_class_folder(source)):
        return _same_everywhere(ranks, lambda: _of_class_folder(source, weights))
    sections = (SECTIONS[weights],)
    if ranks.first(lambda: layout.is_step_folder(source)):
        checkpoint: Path | None = _verified(path, source, sections, ranks)
    else:
        checkpoint = layout.newest_complete(source, sections=sections, ranks=ranks)
    if checkpoint is None:
        raise _nothing_at(path)
    return _same_everywhere(ranks, lambda: _of_checkpoint(checkpoint, weights))


def _same_everywhere(ranks: Ranks, step: Callable[[], Origin]) -> Origin:
    """Each rank reads for itself: an index is too large to send around."""
    found: list[Origin] = []
    ranks.all(lambda: found.append(step()))
    return found[0]


def _verified(path: str, checkpoint: Path, sections: Collection[str], ranks: Ranks) -> Path:
    try:
        layout.verify(checkpoint, sections=sections, ranks=ranks)
    except UserError as error:
        raise UserError(f"init.from={path}: {error}; choose another checkpoint") from error
    return checkpoint


def _nothing_at(path: str) -> ConfigError:
    return ConfigError(f"init.from={path}: no complete checkpoint there; give a run folder with one, a step folder, or "
                       "what `grn-scale convert --to native` made of other files")


def _existing(path: str) -> Path:
    if not Path(path).is_dir():
        what = ("a file: make a checkpoint of it with `grn-scale convert --to native`, and give that"
                if Path(path).exists() else "not there: give a run folder or a step folder")
        raise ConfigError(f"init.from={path} is {what}")
    return Path(path).resolve()


def _of_checkpoint(checkpoint: Path, weights: str) -> Origin:
    folder, state = checkpoint / SECTIONS[weights], read_json(checkpoint / layout.STATE_NAME)
    if not folder.is_dir():
        there = [name for name, section in SECTIONS.items() if (checkpoint / section).is_dir()]
        raise ConfigError(f"{checkpoint} holds no {weights} weights: set "
                          f"{' or '.join(f'init.weights={name}' for name in there) or 'init.from to another'}")
    if not isinstance(state.get("config", {}).get("model"), dict):
        raise UserError(f"{checkpoint / layout.STATE_NAME} does not say of which model these weights are "
                        "(config.model): give a checkpoint of a training run, or a converted one")
    return Origin(checkpoint, weights, folder, ChunkIndex.read(folder), state)


def _is_class_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and read_small_json(path / "config.json").get("kind") == CLASS_KIND


def _of_class_folder(path: Path, weights: str) -> Origin:
    config = read_small_json(path / "config.json").get("model")
    if not isinstance(config, dict):
        raise UserError(f"{path / 'config.json'} carries no model configuration (model)")
    several = any((path / CLASS_FILES[name]).is_file() for name in ("raw", "ema2"))
    files = CLASS_FILES if several else {"raw": CLASS_FILES["ema"]}
    if weights not in files:
        raise ConfigError(f"{path} holds one set of weights, no moving average: set init.weights=raw")
    name = files[weights]
    tensors = {key: StoredTensor(span.dtype, span.shape,
                                 (StoredChunk((0,) * len(span.shape), span.shape, name, key),))
               for key, span in tensor_spans(path / name).items()}
    return Origin(path, weights, path, ChunkIndex(tensors, {}), {"config": {"model": config}})

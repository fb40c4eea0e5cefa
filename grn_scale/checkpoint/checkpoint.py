"""Whole checkpoints: save and load one, and decide what a run resumes from.

A save only reads the chunks' tensors and talks over `group`; `background.py` runs it beside training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from grn_scale.atomic import PARTIAL, write_json
from grn_scale.checkpoint import layout
from grn_scale.checkpoint.chunks import Chunk
from grn_scale.checkpoint.index import FORMAT_VERSION, INDEX_NAME, ChunkIndex, read_json
from grn_scale.checkpoint.ranks import RankError, Ranks
from grn_scale.checkpoint.store import load_chunks, save_chunks
from grn_scale.errors import ConfigError, UserError

T = TypeVar("T")


def save_checkpoint(run_folder: str | Path, step: int, sections: Mapping[str, Sequence[Chunk]], state: dict[str, Any],
                    *, keep_last: int, keep_every: int = 0, doubtful: bool = False,
                    group: dist.ProcessGroup | None = None) -> Path:
    """Save the sections (model, optimizer, ema...) of all ranks and `state` (JSON values), and return the folder.

    The folder appears complete or not at all; then all but the newest `keep_last` checkpoints and those of steps that
    are multiples of `keep_every` (0: none) go, once the new one reads back with its checksums. Every rank calls, each
    with its own chunks (a rank may lack a section); `state` is rank 0's. One that is `doubtful` gets a name that
    nothing resumes from, and none go for it. An error on one rank is raised on all, and
    what it had written is removed: UserError for a full disk, a hole in a tensor, a checkpoint of this step that is
    there.
    """
    run_folder, ranks = Path(run_folder), Ranks(group)
    names = _names(sections, ranks)
    ranks.first(lambda: json.dumps(state, allow_nan=False))
    partial = ranks.first(lambda: _writing(run_folder, lambda: layout.begin(run_folder, step, doubtful=doubtful)))
    try:
        indexes = {name: save_chunks(partial / name, sections.get(name, []), group) for name in names}
        path = ranks.first(lambda: _writing(run_folder, lambda: seal(partial, step, indexes, state, ranks.size)))
    except (UserError, RankError):  # raised on every rank together, so nobody writes any more
        ranks.first(lambda: partial.exists() and layout.discard(partial))
        raise
    if not doubtful and (going := ranks.first(lambda: layout.surplus(run_folder, keep_last, keep_every))):
        layout.verify(path, ranks=ranks)
        ranks.first(lambda: _rotate(run_folder, going, path))
    return path


def load_checkpoint(path: str | Path, sections: Mapping[str, Sequence[Chunk]],
                    group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Fill the chunks of each section in place and return the saved state, on every rank.

    Any boxes load from any boxes. Strict: UserError naming every tensor that is missing, left over, or of
    another shape or dtype. A whole section that is not asked for is left out and logged.
    """
    path, ranks = Path(path), Ranks(group)
    layout.verify(path, sections=(), ranks=ranks)
    there = ranks.first(lambda: section_names(path))
    names = _names(sections, ranks)
    missing = sorted(set(names) - set(there))
    if missing:
        raise UserError(f"{path} holds no {', '.join(missing)} (it holds {', '.join(there)})")
    for name in sorted(set(there) - set(names)):
        if ranks.rank == 0:
            layout.log.warning("%s: %s is in the checkpoint, but not restored: nothing here takes it", path, name)
    for name in names:
        load_chunks(path / name, sections.get(name, []), group)
    return ranks.first(lambda: read_json(path / layout.STATE_NAME))


def read_state(path: str | Path) -> dict[str, Any]:
    """The state saved with a checkpoint, without its tensors."""
    return read_json(Path(path) / layout.STATE_NAME)


def section_names(path: str | Path) -> list[str]:
    """The sections that a checkpoint holds."""
    return list(read_json(Path(path) / INDEX_NAME)["sections"])


def resolve_resume(mode: str, run_folder: str | Path, group: dist.ProcessGroup | None = None) -> Path | None:
    """The step folder to resume from, verified, or None for a fresh start; the same on every rank.

    mode: "none" starts afresh and refuses a used run folder; "auto" takes the newest complete checkpoint of the
    run folder where there is one; "must" fails where there is none; anything else is the path of a step folder
    or of a run folder. Call it before anything is written into the run folder. ConfigError where the request
    contradicts what is there, UserError where checkpoints are there but none can be used.
    """
    run_folder, ranks = Path(run_folder), Ranks(group)
    if mode == "none":
        ranks.first(lambda: _refuse_used(run_folder))
        return None
    if mode in ("auto", "must"):
        return _newest(run_folder, ranks, needed=mode == "must")
    if not mode:
        raise ConfigError("--resume is empty (an unset variable?): give none, auto, must, or a step or run folder")
    path = Path(mode)
    path = ranks.first(lambda: path.resolve())
    if not ranks.first(path.is_dir):
        what = "is a file" if ranks.first(path.exists) else "no such folder"
        raise ConfigError(f"--resume {mode}: {what}; give a step folder, a run folder, or none, auto or must")
    if path.name.endswith(PARTIAL):
        raise ConfigError(f"--resume {mode}: a save or a removal that has not ended; give a step folder without "
                          f"{PARTIAL}, or auto")
    if ranks.first(lambda: layout.is_step_folder(path)):
        try:
            layout.verify(path, ranks=ranks)
        except UserError as error:
            raise UserError(f"--resume {mode}: {error}; choose another checkpoint") from error
    else:
        path = _newest(path, ranks, needed=True)
    ranks.first(lambda: _refuse_fork(path, run_folder))
    return path


def _names(sections: Mapping[str, Sequence[Chunk]], ranks: Ranks) -> list[str]:
    """The sections of all ranks: every rank must take part in each, also one that holds nothing of it."""
    names = sorted(set().union(*ranks.all(lambda: list(sections))))
    for name in names:
        if not layout.SECTION.fullmatch(name):
            raise ValueError(f"section {name!r} must be a lower-case identifier: it becomes a folder")
    return names


def _writing(run_folder: Path, step: Callable[[], T]) -> T:
    try:
        return step()
    except OSError as error:
        raise UserError(f"cannot save into {run_folder}: {error.strerror or error} ({error.filename}); free space or "
                        "choose another folder, the checkpoints already there stay as they are") from error


def _rotate(run_folder: Path, going: Sequence[Path], verified: Path) -> None:
    try:
        layout.prune(going, verified)
    except OSError as error:  # the new checkpoint is whole; what is left over goes at the next save
        layout.log.warning("old checkpoints in %s could not be removed: %s", run_folder, error)


def seal(partial: Path, step: int, indexes: Mapping[str, ChunkIndex], state: dict[str, Any], world_size: int) -> Path:
    """Turn a `.partial` folder whose chunk folders are written into a checkpoint, and return its path.

    indexes: the index of each section; world_size: how many processes wrote them.
    """
    write_json(partial / layout.STATE_NAME, state)
    write_json(partial / INDEX_NAME, {
        "format_version": FORMAT_VERSION,
        "step": step,
        "sections": {name: {"tensors": len(index.tensors), "parameters": index.parameters,
                            "bytes": sum(file.bytes for file in index.files.values())}
                     for name, index in indexes.items()},
        "world_size": world_size,
        "versions": {"torch": torch.__version__},
    })
    return layout.commit(partial, indexes)


def _newest(run_folder: Path, ranks: Ranks, needed: bool) -> Path | None:
    path = layout.newest_complete(run_folder, ranks=ranks)
    if path is not None:
        return path
    found = ranks.first(lambda: layout.scan(run_folder))
    # A save that was killed before the first checkpoint leaves nothing to lose; a damaged checkpoint does.
    if needed or any(f.sealed for f in found):
        reasons = "".join(f"\n  {f.path.name}: {f.problem or 'its contents do not match their checksums'}"
                          for f in found)
        raise UserError(f"no checkpoint in {run_folder} can be resumed from{':' if reasons else ''}{reasons}\n"
                        "Give the path of another checkpoint, or start afresh in a new run folder")
    return None


def _refuse_used(run_folder: Path) -> None:
    if not run_folder.is_dir():
        return
    used = sorted(entry.name for entry in run_folder.iterdir()
                  if entry.suffix == ".jsonl" or entry.name == "config.yaml"
                  or layout.STEP_FOLDER.fullmatch(entry.name.removesuffix(PARTIAL)))
    if used:
        raise ConfigError(f"run folder {run_folder} was used before (it holds {used[0]}); "
                          "resume it with --resume auto, or give another run folder")


def _refuse_fork(path: Path, run_folder: Path) -> None:
    """A run folder holds one history: what is resumed must be its newest checkpoint, or the folder must be new."""
    if path.parent != run_folder.resolve():
        _refuse_used(run_folder)
        return
    step = read_json(path / INDEX_NAME)["step"]
    newer = [found.path.name for found in layout.scan(run_folder) if not found.problem and found.step > step]
    if newer:
        raise ConfigError(f"{run_folder} holds {newer[0]}, which is newer than the {path.name} asked for; "
                          "continue in another run folder, or move the newer checkpoints away")

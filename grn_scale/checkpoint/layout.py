"""Checkpoint folders: how one comes into being, which one is whole, and how old ones go.

    run folder/
      step-00000200/            a checkpoint
        model/ optimizer/ ema/  chunk folders: rank-*.safetensors and metadata.json with their sha256
        metadata.json           step, sections, versions
        state.json              what the training side wants back
        COMPLETE                sha256 of every JSON file above; so it seals every byte
      step-00000400.partial/    a save under way, what a killed one left, or a removal under way
      step-00000600.doubtful/   a checkpoint that may hold what a loss spike came from: nothing resumes from it

A save writes into `.partial`, seals it with the file `SEAL` inside, renames the folder, and last renames
`SEAL` to `COMPLETE`. A removal goes the other way: the folder is renamed to `.partial` before anything in it is
touched. So a kill at any moment leaves each folder either whole or recognisably not.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from grn_scale.atomic import PARTIAL, intended_name, write_json
from grn_scale.checkpoint.index import (
    FILE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    ChunkIndex,
    read_json,
    require_version,
    sha256_of,
    sync_folder,
)
from grn_scale.checkpoint.ranks import Ranks
from grn_scale.errors import UserError

STATE_NAME = "state.json"
SEAL = "SEAL"
COMPLETE = "COMPLETE"
DOUBTFUL = ".doubtful"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
UNFINISHED = re.compile(STEP_FOLDER.pattern + f"({re.escape(DOUBTFUL)})?{re.escape(PARTIAL)}")
SECTION = re.compile(r"[a-z][a-z0-9_]*")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """One step folder of a run folder."""

    path: Path
    step: int
    problem: str
    """Why it cannot be loaded; empty where it can."""
    sealed: bool
    """The save that wrote it had finished: a problem is later damage, not a save that was killed."""


def step_folder(run_folder: Path, step: int, *, doubtful: bool = False) -> Path:
    """Where the checkpoint of a step lies, or the one that is in doubt."""
    return run_folder / f"step-{step:08d}{DOUBTFUL if doubtful else ''}"


def step_of(folder: Path) -> int:
    """The step in the name of a step folder."""
    return int(STEP_FOLDER.fullmatch(folder.name)[1])


def _step_folders(run_folder: Path) -> list[Path]:
    return [path for path in run_folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and path.is_dir()]


def partial_folder(folder: Path) -> Path:
    """Where a step folder is while it is written or removed."""
    return folder.with_name(folder.name + PARTIAL)


def is_step_folder(path: Path) -> bool:
    """Whether a path means one checkpoint (a copy may have another name) and not a folder of several."""
    return bool(STEP_FOLDER.fullmatch(path.name)) or (path / COMPLETE).exists()


def verify(path: Path, *, sections: Collection[str] | None = None, ranks: Ranks | None = None) -> None:
    """UserError saying what is wrong unless the checkpoint is complete and its checksums hold.

    sections: those whose data files are read through; None is all of them. Of the others only existence and size
    are looked at. `ranks` share the reading (all of them must call); None is this process alone.
    """
    ranks = ranks or Ranks(alone=True)
    files = ranks.first(lambda: _check_seal(path, COMPLETE))
    files = [f for f in files if sections is None or f[0].parent.name in sections]
    ranks.all(lambda: _check_contents(files[ranks.rank::ranks.size]))


def scan(run_folder: Path) -> list[Found]:
    """The step folders of a run, newest first, each with what keeps it from being loaded (contents not read)."""
    if not run_folder.is_dir():
        return []
    found = []
    for path in _step_folders(run_folder):
        try:
            verify(path, sections=())
            problem = ""
        except UserError as error:
            problem = str(error)
        found.append(Found(path, step_of(path), problem, (path / COMPLETE).exists()))
    return sorted(found, key=lambda f: f.step, reverse=True)


def newest_complete(run_folder: Path, *, sections: Collection[str] | None = None, before: int | None = None,
                    ranks: Ranks | None = None) -> Path | None:
    """The newest checkpoint (before a step, where one is given) that is complete and whose checksums hold (see
    `verify`), or None.

    Each one passed over is logged with its reason. `ranks` share the reading and get the same answer.
    """
    ranks = ranks or Ranks(alone=True)
    for found in ranks.first(lambda: scan(run_folder)):
        if before is not None and found.step >= before:
            continue
        problem = found.problem
        if not problem:
            try:
                verify(found.path, sections=sections, ranks=ranks)
            except UserError as error:
                problem = str(error)
        if not problem:
            return found.path
        if ranks.rank == 0:
            log.warning("skipped checkpoint %s: %s", found.path, problem)
    return None


def begin(run_folder: Path, step: int, *, doubtful: bool = False) -> Path:
    """Empty `.partial` folder for a save, once what killed saves and removals left in the run folder is gone.

    A checkpoint that is in doubt replaces another one of its step. UserError where a whole checkpoint of this step is
    there already, or something that is not ours is in the way.
    """
    final = step_folder(run_folder, step, doubtful=doubtful)
    run_folder.mkdir(parents=True, exist_ok=True)
    for path in list(run_folder.iterdir()):
        if UNFINISHED.fullmatch(path.name):
            discard(path)
    for path in _step_folders(run_folder):
        if (path / SEAL).exists() and not (path / COMPLETE).exists():
            remove(path)
    if doubtful and final.exists():
        remove(final)
    elif final.exists():
        try:
            verify(final)
        except UserError as error:
            # A run that had to restart before this step comes to it again: the damaged one gives way.
            log.warning("replacing the damaged checkpoint %s: %s", final, error)
            remove(final)
        else:
            raise UserError(f"{final} is a complete checkpoint already and is never overwritten; "
                            "save another step, or remove it first")
    partial = partial_folder(final)
    for path in (final, partial):
        if path.exists():
            raise UserError(f"{path} is in the way of a save and holds files that no save wrote; move it away")
    partial.mkdir()
    sync_folder(run_folder)
    return partial


def commit(partial: Path, sections: Collection[str]) -> Path:
    """Turn a fully written `.partial` folder, which holds these sections, into a checkpoint and return its path.

    UserError where files of it are gone, or cannot be seen from here.
    """
    names = [INDEX_NAME, STATE_NAME, *sorted(f"{section}/{INDEX_NAME}" for section in sections)]
    lost = [name for name in names if not (partial / name).is_file()]
    if lost:
        raise UserError(f"{partial / lost[0]} is gone, though this save wrote it: does another job save into "
                        f"{partial.parent}?")
    write_json(partial / SEAL, {
        "format_version": FORMAT_VERSION, "sha256": {name: sha256_of(partial / name) for name in names}})
    # Files that another host wrote must be visible here: otherwise the folder is not shared.
    _check_seal(partial, SEAL)
    sync_folder(partial)
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    os.rename(partial, final)
    sync_folder(final.parent)
    os.rename(final / SEAL, final / COMPLETE)
    sync_folder(final)
    return final


def surplus(run_folder: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """The complete checkpoints that are neither among the newest `keep_last` nor of a step that is a multiple of
    `keep_every` (0: no step is), newest first."""
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}, but at least one checkpoint is kept")
    complete = [found for found in scan(run_folder) if not found.problem]
    return [found.path for found in complete[keep_last:] if not keep_every or found.step % keep_every]


def prune(going: Collection[Path], verified: Path) -> list[Path]:
    """Remove the `surplus` checkpoints and return what was removed.

    verified: one whose contents are known to verify, which stays. Folders that hold files that no save writes are left
    alone.
    """
    return [path for path in going if path != verified and remove(path)]


def set_aside(run_folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints of this step and later ones, so that nothing resumes from them, and return the new paths.

    They may hold what a loss spike came from. One replaces another that was set aside of the same step.
    """
    aside = []
    for path in sorted(_step_folders(run_folder)):
        doubtful = path.with_name(path.name + DOUBTFUL)
        if step_of(path) < step or (doubtful.exists() and not remove(doubtful)):
            continue
        os.rename(path, doubtful)
        aside.append(doubtful)
        log.warning("%s may hold what the loss spike came from: nothing resumes from %s", path, doubtful.name)
    sync_folder(run_folder)
    return aside


def remove(path: Path) -> bool:
    """Remove a step folder, so that it is at no moment mistaken for a checkpoint.

    False, with a warning, where it holds something that no save writes; it then stays as it is.
    """
    foreign = _foreign(path)
    if foreign:
        log.warning("%s is left as it is: it holds %s, which no save wrote", path, foreign)
        return False
    partial = partial_folder(path)
    if partial.exists() and not discard(partial):
        return False
    os.rename(path, partial)
    sync_folder(path.parent)
    return discard(partial)


def _check_seal(path: Path, seal_name: str) -> list[tuple[Path, str]]:
    """The data files with their sha256. UserError unless the seal is there, every JSON file is what it says, and
    every data file has its size."""
    if not path.is_dir():
        raise UserError(f"{path} is no checkpoint folder")
    if not (path / seal_name).exists():
        raise UserError("no completion marker: the save was interrupted, or this is no checkpoint")
    seal = read_json(path / seal_name)
    try:
        require_version(path / seal_name, seal)
        checksums = dict(seal["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / seal_name} is malformed ({error!r})") from error
    data_files = []
    for name in dict.fromkeys((INDEX_NAME, STATE_NAME, *checksums)):
        section, _, file = name.rpartition("/")
        if file not in (INDEX_NAME, STATE_NAME) or (section and not SECTION.fullmatch(section)):
            raise UserError(f"{path / seal_name} names {name!r}, which is no file of a checkpoint")
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing")
        if sha256_of(path / name) != checksums.get(name):
            raise UserError(f"{path / name} was changed since it was saved (its checksum differs)")
        if section:
            data_files += [(path / section / data, stored)
                           for data, stored in ChunkIndex.read(path / section).files.items()]
    named = read_json(path / INDEX_NAME).get("sections")
    if not isinstance(named, dict) or set(named) != {name.partition("/")[0] for name in checksums if "/" in name}:
        raise UserError(f"{path / seal_name} seals other sections than {path / INDEX_NAME} names")
    for file, stored in data_files:
        if not file.is_file():
            raise UserError(f"{file} is missing; all ranks must write to one shared folder")
        if file.stat().st_size != stored.bytes:
            raise UserError(f"{file} has {file.stat().st_size} bytes instead of {stored.bytes}")
    return [(file, stored.sha256) for file, stored in data_files]


def _check_contents(files: list[tuple[Path, str]]) -> None:
    for file, checksum in files:
        try:
            actual = sha256_of(file)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from error
        if actual != checksum:
            raise UserError(f"{file} was changed since it was saved (its checksum differs)")


def _foreign(folder: Path) -> str:
    """Name of something in a step folder that no save writes, or empty."""
    if folder.is_symlink() or not folder.is_dir():
        return folder.name
    for entry in sorted(folder.rglob("*")):
        inside = entry.relative_to(folder)
        name = intended_name(entry.name)
        if entry.is_symlink():
            return str(inside)
        if len(inside.parts) == 1 and (SECTION.fullmatch(entry.name) if entry.is_dir()
                                       else name in (INDEX_NAME, STATE_NAME, SEAL, COMPLETE)):
            continue
        if len(inside.parts) == 2 and entry.is_file() and (name == INDEX_NAME or FILE_NAME.fullmatch(name)):
            continue
        return str(inside)
    return ""


def discard(partial: Path) -> bool:
    """Delete a `.partial` folder, file by file; False, with a warning, where it holds anything foreign."""
    foreign = _foreign(partial)
    if foreign:
        log.warning("%s is left as it is: it holds %s, which no save wrote", partial, foreign)
        return False
    for entry in sorted(partial.rglob("*"), reverse=True):  # contents before their folders
        entry.rmdir() if entry.is_dir() else entry.unlink()
    partial.rmdir()
    sync_folder(partial.parent)
    return True

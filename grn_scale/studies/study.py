"""A scaling study on disk, and the matrix of cells that follows from its file.

    STUDY/study.json                        what was asked for, the cells with the hash of their configuration, and the
                                            layouts that are illegal with the reason
    STUDY/cells/NAME/config.yaml            resolved configuration of a cell
    STUDY/cells/NAME/attempt-0001/          run folder of an attempt; a failed cell starts afresh in the next one
    STUDY/cells/NAME/attempt-0001.site.yaml facts of the site that it was submitted to, with the nodes of this cell
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import config_yaml
from grn_scale.config.check import check_layout
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.studies.study_file import Size, StudyFile

STUDY, CELLS, CONFIG = "study.json", "cells", "config.yaml"
PACKS = "data.packs_per_step"
"""What grows with the number of processes in weak scaling."""
FORMAT = "grn_scale scaling study 2"
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    series: str
    """Layout and values of the axes: cells of a series differ in size and repeats alone."""
    size: Size
    repeat: int
    values: dict[str, Any]
    """Dotted keys in which this cell differs from the study's base."""
    config_sha256: str
    """Of config.yaml as it was generated."""


@dataclass(frozen=True)
class Study:
    """A study on disk."""

    folder: Path
    file: StudyFile
    cells: tuple[Cell, ...]
    illegal: tuple[dict[str, Any], ...]
    """Series, size and reason of what no run can be."""

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / CELLS / cell.name

    def attempts(self, cell: Cell) -> list[Path]:
        """Run folders of a cell, oldest first."""
        return sorted(self.cell_folder(cell).glob("attempt-[0-9][0-9][0-9][0-9]"))

    def config_of(self, cell: Cell) -> Path:
        """The cell's configuration. UserError where it is not what was generated."""
        path = self.cell_folder(cell) / CONFIG
        if not path.is_file() or _digest(path.read_bytes()) != cell.config_sha256:
            raise UserError(f"{path} is not what `scaling generate` wrote, and a cell that differs from its study "
                            "measures something else: put it back, or change the study file and generate another study")
        return path

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return self.file.warmup_steps + self.file.measured_steps


def site_file(attempt: Path) -> Path:
    """Where the facts of the site stand that an attempt was submitted to."""
    return attempt.with_name(f"{attempt.name}.site.yaml")


def generate(file: StudyFile, folder: Path) -> Study:
    """Write the study's folder. Raises ConfigError where no cell is legal, UserError where the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another output, or `grn-scale scaling submit {folder}`")
    cells: list[Cell] = []
    illegal, texts = [], {}
    for series, keys in series_of(file):
        for size in file.processes:
            try:
                values = {**keys, **_growth(file, keys, size)}
                config = _resolve(file, values)
                check_layout(config, size.processes)
            except ConfigError as error:
                illegal.append({"series": series, "size": size.label, "reason": str(error)})
                continue
            text = config_yaml(config)
            for repeat in range(1, file.repeats + 1):
                name = f"{series}-{'n' if size.per_node else 'p'}{size.label}-r{repeat}"
                if name in texts:
                    raise ConfigError(f"two cells would be called {name}: give layouts and values other names")
                cells.append(Cell(name, series, size, repeat, values, _digest(text.encode())))
                texts[name] = text
    if not cells:
        raise ConfigError("no cell of the study is legal:\n" + "\n".join(
            f"  {each['series']} on {each['size']} processes: {each['reason']}" for each in illegal))
    study = Study(folder.absolute(), file, tuple(cells), tuple(illegal))
    for name, text in texts.items():
        (folder / CELLS / name).mkdir(parents=True)
        write_bytes(folder / CELLS / name / CONFIG, text.encode())
    write_json(folder / STUDY, {"format": FORMAT, "file": asdict(file), "cells": [asdict(cell) for cell in cells],
                                "illegal": illegal})
    return study


def read_study(folder: Path) -> Study:
    """A study that `generate` wrote; UserError where the folder holds none."""
    path = folder / STUDY
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise UserError(f"{path} is of format {found['format']!r}, not {FORMAT!r}: generate it again")
        sizes = tuple(Size(**size) for size in found["file"]["processes"])
        cells = tuple(Cell(**{**cell, "size": Size(**cell["size"])}) for cell in found["cells"])
        return Study(folder.absolute(), StudyFile(**{**found["file"], "processes": sizes}), cells,
                     tuple(found["illegal"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no folder of a scaling study ({error}): make one with `grn-scale scaling "
                        f"generate --config study.yaml output={folder}`") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def series_of(file: StudyFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and dotted keys of every combination of layout and axes, in the order of the file."""
    for name, layout in (file.layouts or {"base": {}}).items():
        for values in itertools.product(*file.axes.values()):
            axes = dict(zip(file.axes, values))
            parts = [name, *(f"{key.rpartition('.')[2]}{_short(value)}" for key, value in axes.items())]
            yield "-".join(_NOT_IN_NAMES.sub("_", str(part)) for part in parts), {**layout, **axes}


def _short(value: Any) -> str:
    return Path(str(value)).stem if "/" in str(value) else str(value)


def _growth(file: StudyFile, keys: Mapping[str, Any], size: Size) -> dict[str, int]:
    """What grows with the number of processes: packs_per_step of weak scaling, in proportion to the smallest cell."""
    if file.mode == "strong":
        return {}
    packs, smallest = _resolve(file, keys).data.packs_per_step, min(each.processes for each in file.processes)
    if packs * size.processes % smallest:
        raise ConfigError(f"weak scaling from {smallest} to {size.processes} processes: {PACKS}={packs} "
                          f"does not grow to a whole number; take a multiple of {smallest}")
    return {PACKS: packs * size.processes // smallest}


def _resolve(file: StudyFile, values: Mapping[str, Any]) -> Config:
    """Configuration of a cell. Nothing is validated, nor saved before the last step: no run goes on half-way."""
    steps = file.warmup_steps + file.measured_steps
    protocol = {"train.steps": steps, "train.checkpoint_every": steps, "train.keep_every": 0,
                "train.validate_every": 0,
                "watchdog.straggler_every": max(1, file.measured_steps // 3)}
    keys = {**protocol, **file.set, **values}
    clash = sorted((file.set.keys() | values.keys()) & protocol.keys())
    if clash:
        raise ConfigError(f"{clash[0]} is set by the study's protocol: use warmup_steps and measured_steps")
    return load_config(file.config or None, [f"{key}={_text(value)}" for key, value in keys.items()])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""A scaling study: its file, and the matrix of cells that follows from it.

    STUDY/study.json                what was asked for, the cells, and the layouts that are illegal with the reason
    STUDY/cells/NAME/config.yaml    resolved configuration of a cell
    STUDY/cells/NAME/attempt-0001/  run folder of an attempt; a failed cell starts afresh in the next one
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import config_yaml
from grn_scale.config.check import check_layout
from grn_scale.config.load import build, load_config, parse_yaml
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError

STUDY, CELLS, CONFIG = "study.json", "cells", "config.yaml"
FORMAT = "grn_scale scaling study 1"
MODES = ("weak", "strong")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class StudyFile:
    """What a study file may hold."""

    name: str = ""
    config: str = ""
    """Run file that all cells start from, beside the study file; empty: the defaults."""
    set: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value, of all cells."""
    mode: str = "strong"
    """weak: data.packs_per_step grows with the number of processes; strong: it stays."""
    processes: tuple[int, ...] = ()
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> dotted keys of a layout; empty: one layout, named base."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted key -> values; every combination is a series of its own."""
    repeats: int = 3
    warmup_steps: int = 10
    """Steps at the start of each run that are left out of the measurement."""
    measured_steps: int = 30


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    series: str
    """Layout and values of the axes: cells of a series differ in processes and repeats alone."""
    processes: int
    repeat: int
    values: dict[str, Any]
    """Dotted keys in which this cell differs from the study's base."""


@dataclass(frozen=True)
class Study:
    """A study on disk."""

    folder: Path
    file: StudyFile
    cells: tuple[Cell, ...]
    illegal: tuple[dict[str, Any], ...]
    """Series, processes and reason of what no run can be."""

    def cell_folder(self, cell: Cell) -> Path:
        return self.folder / CELLS / cell.name

    def attempts(self, cell: Cell) -> list[Path]:
        """Run folders of a cell, oldest first."""
        return sorted(self.cell_folder(cell).glob("attempt-[0-9][0-9][0-9][0-9]"))

    @property
    def steps(self) -> int:
        """Steps of every run."""
        return self.file.warmup_steps + self.file.measured_steps


def read_study_file(path: Path) -> StudyFile:
    """The study that a YAML file asks for; ConfigError naming the key, the rule and the remedy."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such study file; docs/scaling.md shows one")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a study file is a mapping with at least `processes: [1, 2, 4]`")
    maps = {key: values.pop(key, None) or {} for key in ("set", "layouts", "axes")}
    for key, found in maps.items():
        if not isinstance(found, dict):
            raise ConfigError(f"{path}: {key} is {found!r}, but must be a mapping")
    for name, layout in maps["layouts"].items():
        if layout is not None and not isinstance(layout, dict):
            raise ConfigError(f"{path}: layouts.{name} is {layout!r}, but must map dotted keys to values")
    for key, points in maps["axes"].items():
        if not isinstance(points, list) or not points:
            raise ConfigError(f"{path}: axes.{key} is {points!r}, but must be a list of values, such as [1, 2]")
    plain = build(_Plain, values)
    if plain.mode not in MODES:
        raise ConfigError(f"{path}: mode is {plain.mode!r}, but must be weak or strong")
    if not plain.processes or min(plain.processes) < 1 or len(set(plain.processes)) < len(plain.processes):
        raise ConfigError(f"{path}: processes is {list(plain.processes)}, but must hold different numbers above 0, "
                          "such as [1, 2, 4]")
    for key, least in (("repeats", 1), ("measured_steps", 2), ("warmup_steps", 0)):
        if getattr(plain, key) < least:
            raise ConfigError(f"{path}: {key} is {getattr(plain, key)}, but must be at least {least}")
    layouts = {name: layout or {} for name, layout in maps["layouts"].items()}
    config = plain.config
    if config and not config.startswith("configs/") and (path.parent / config).is_file():
        config = str((path.parent / config).absolute())
    return StudyFile(**{**asdict(plain), "config": config, "name": plain.name or path.stem}, set=maps["set"],
                     layouts=layouts, axes=maps["axes"])


def generate(file: StudyFile, folder: Path) -> Study:
    """Write the study's folder. Raises ConfigError where no cell is legal, UserError where the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another output, or `grn-scale scaling submit {folder}`")
    cells, illegal, texts = [], [], {}
    for series, keys in _series(file):
        for processes in file.processes:
            try:
                values = {**keys, **_growth(file, keys, processes)}
                config = _resolve(file, values)
                check_layout(config, processes)
            except ConfigError as error:
                illegal.append({"series": series, "processes": processes, "reason": str(error)})
                continue
            for repeat in range(1, file.repeats + 1):
                cell = Cell(f"{series}-p{processes}-r{repeat}", series, processes, repeat, values)
                if cell.name in texts:
                    raise ConfigError(f"two cells would be called {cell.name}: give layouts and values other names")
                cells.append(cell)
                texts[cell.name] = config_yaml(config)
    if not cells:
        raise ConfigError("no cell of the study is legal:\n" + "\n".join(
            f"  {each['series']} on {each['processes']} processes: {each['reason']}" for each in illegal))
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
        known = found["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no folder of a scaling study ({error}): make one with `grn-scale scaling "
                        f"generate --config study.yaml output={folder}`") from error
    if not known:
        raise UserError(f"{path} is of format {found['format']!r}, not {FORMAT!r}: generate it again")
    file = StudyFile(**{**found["file"], "processes": tuple(found["file"]["processes"])})
    return Study(folder.absolute(), file, tuple(Cell(**cell) for cell in found["cells"]),
                 tuple(found["illegal"]))


@dataclass(frozen=True)
class _Plain:
    """The keys of a study file that are no free mappings."""

    name: str = ""
    config: str = ""
    mode: str = "strong"
    processes: tuple[int, ...] = ()
    repeats: int = 3
    warmup_steps: int = 10
    measured_steps: int = 30


def _series(file: StudyFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and dotted keys of every combination of layout and axes, in the order of the file."""
    for name, layout in (file.layouts or {"base": {}}).items():
        for values in itertools.product(*file.axes.values()):
            axes = dict(zip(file.axes, values))
            parts = [name, *(f"{key.rpartition('.')[2]}{_short(value)}" for key, value in axes.items())]
            yield "-".join(_NOT_IN_NAMES.sub("_", str(part)) for part in parts), {**layout, **axes}


def _short(value: Any) -> str:
    return Path(str(value)).stem if "/" in str(value) else str(value)


def _growth(file: StudyFile, keys: Mapping[str, Any], processes: int) -> dict[str, int]:
    """What grows with the number of processes: packs_per_step of weak scaling, in proportion to the smallest cell."""
    if file.mode == "strong":
        return {}
    try:
        packs = _resolve(file, keys).data.packs_per_step
    except ConfigError:
        return {}  # told, with its reason, where the cell is resolved
    smallest = min(file.processes)
    if packs * processes % smallest:
        raise ConfigError(f"weak scaling from {smallest} to {processes} processes: data.packs_per_step={packs} does "
                          f"not grow to a whole number; take a multiple of {smallest}")
    return {"data.packs_per_step": packs * processes // smallest}


def _resolve(file: StudyFile, values: Mapping[str, Any]) -> Config:
    """Configuration of a cell. Nothing is validated, nor saved before the last step: no run goes on half-way."""
    steps = file.warmup_steps + file.measured_steps
    protocol = {"train.steps": steps, "train.checkpoint_every": steps, "train.validate_every": 0,
                "watchdog.straggler_every": max(1, file.measured_steps // 3)}
    keys = {**protocol, **file.set, **values}
    clash = sorted((file.set.keys() | values.keys()) & protocol.keys())
    if clash:
        raise ConfigError(f"{clash[0]} is set by the study's protocol: use warmup_steps and measured_steps")
    return load_config(file.config or None, [f"{key}={_text(value)}" for key, value in keys.items()])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

"""The file that asks for a scaling study (docs/scaling.md shows one)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grn_scale.command_line import dotted_keys, nearest
from grn_scale.config.load import build, key_types, parse_yaml
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError

MODES = ("weak", "strong")
_GRID = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class Size:
    """How many processes a cell has, and where."""

    processes: int
    per_node: int = 0
    """Of each node; 0: as many as the cluster file says, or all on one node where there are fewer."""

    @property
    def label(self) -> str:
        """As it is written in a study file: 8, or 2x4 for two nodes of four."""
        return f"{self.processes // self.per_node}x{self.per_node}" if self.per_node else str(self.processes)

    @classmethod
    def read(cls, value: Any, where: str) -> Size:
        """ConfigError unless it is a number above 0, or NODESxPROCESSES."""
        grid = _GRID.fullmatch(value) if isinstance(value, str) else None
        if grid:
            return cls(int(grid[1]) * int(grid[2]), int(grid[2]))
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{where} holds {value!r}, but must hold numbers of processes above 0, such as 4, or "
                              "nodes x processes of a node, such as 2x4")
        return cls(value)


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
    processes: tuple[Size, ...] = ()
    layouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> dotted keys of a layout; empty: one layout, named base."""
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted key -> values; every combination is a series of its own."""
    repeats: int = 3
    warmup_steps: int = 10
    """Steps at the start of each run that are left out of the measurement."""
    measured_steps: int = 30


@dataclass(frozen=True)
class _Plain:
    """The keys of a study file that are single values."""

    name: str = ""
    config: str = ""
    mode: str = "strong"
    repeats: int = 3
    warmup_steps: int = 10
    measured_steps: int = 30


LEAST = {"repeats": 1, "measured_steps": 2, "warmup_steps": 0}
KEYS = tuple(key_types(StudyFile))


def read_study_file(path: Path) -> StudyFile:
    """The study that a YAML file asks for; ConfigError naming the key, the rule and the remedy."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: cannot read the study file {path}: {error}; docs/scaling.md shows one") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a study file is a mapping with at least `processes: [1, 2, 4]`")
    try:
        return _study(values, path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _study(values: dict[str, Any], path: Path) -> StudyFile:
    for key in values:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key}; {nearest(str(key), KEYS)}")
    maps = {key: values.pop(key, None) or {} for key in ("set", "layouts", "axes")}
    for key, found in maps.items():
        if not isinstance(found, dict):
            raise ConfigError(f"{key} is {found!r}, but must be a mapping")
    layouts = {str(name): {} if layout is None else layout for name, layout in maps["layouts"].items()}
    for name, layout in layouts.items():
        if not isinstance(layout, dict):
            raise ConfigError(f"layouts.{name} is {layout!r}, but must map dotted keys to values")
    for key, points in maps["axes"].items():
        if not isinstance(points, list) or not points or any(points.count(point) > 1 for point in points):
            raise ConfigError(f"axes.{key} is {points!r}, but must be a list of different values, such as [1, 2]")
    _check_keys(maps["set"], layouts, maps["axes"])
    sizes = _sizes(values.pop("processes", None))
    plain = build(_Plain, values)
    if plain.mode not in MODES:
        raise ConfigError(f"mode is {plain.mode!r}, but must be weak or strong")
    for key, least in LEAST.items():
        if getattr(plain, key) < least:
            raise ConfigError(f"{key} is {getattr(plain, key)}, but must be at least {least}")
    config = plain.config
    if config and not config.startswith("configs/") and (path.parent / config).is_file():
        config = str((path.parent / config).absolute())
    return StudyFile(**{**asdict(plain), "config": config, "name": plain.name or path.stem}, set=maps["set"],
                     layouts=layouts, axes=maps["axes"], processes=sizes)


def _sizes(values: Any) -> tuple[Size, ...]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"processes is {values!r}, but must be a list of numbers, such as [1, 2, 4], or [1x4, 2x4] "
                          "for nodes x processes of a node")
    sizes = tuple(Size.read(value, "processes") for value in values)
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"processes is {values!r}, which holds a size twice: leave one out (`repeats` runs all cells "
                          "several times)")
    return sizes


def _check_keys(common: Mapping[str, Any], layouts: Mapping[str, Mapping[str, Any]],
                axes: Mapping[str, list[Any]]) -> None:
    """A mistyped key would make each cell illegal, with the same reason."""
    sections = key_types(Config)
    valid = [*dotted_keys(Config), *sections]

    def check(where: str, keys: Iterable[Any]) -> None:
        for key in map(str, keys):
            if key not in valid:
                section = key.partition(".")[0]
                near = [each for each in valid if each.startswith(f"{section}.")] or sections
                raise ConfigError(f"{where} sets {key}, which is no configuration key; {nearest(key, near)}")
            if key == "output":
                raise ConfigError(f"{where} sets output, but each cell writes into its own folder: leave it out")

    check("set", common)
    for name, layout in layouts.items():
        check(f"layouts.{name}", layout)
        for key in layout.keys() & axes.keys():
            raise ConfigError(f"{key} stands in layouts.{name} and in axes: keep one of them")
    check("axes", axes)

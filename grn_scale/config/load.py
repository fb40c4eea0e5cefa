"""YAML file plus dotted overrides -> frozen dataclass, strictly: an unknown key names its nearest valid one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError

T = TypeVar("T")
SHIPPED = Path(__file__).resolve().parents[2] / "configs"
"""configs/ of a checkout; `shipped_file` falls back to the copy inside an installed wheel."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (1e-3), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"{key_node.start_mark.name}:{key_node.start_mark.line + 1}: "
                                  f"key {key!r} stands here a second time; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789."))


def parse_yaml(text: str, name: str) -> Any:
    """Value of a YAML text; ConfigError with file and line where it cannot be read."""
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from error
    finally:
        loader.dispose()


def shipped_file(name: str) -> Path:
    """Path of a file of configs/, in a checkout or in an installed package."""
    checkout = SHIPPED / name
    if checkout.exists():
        return checkout
    from importlib.resources import files

    return Path(str(files("grn_scale.configs").joinpath(name)))


def read_mapping(path: Path, field: str) -> dict[str, Any]:
    """Content of a YAML file of keys and values; ConfigError, naming the `field` it was given for, otherwise."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}: cannot read {path}: {error}") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold keys and values, but holds {type(value).__name__}")
    return value


def _unknown(key: str, valid: Iterable[str], prefix: str) -> ConfigError:
    valid = list(valid)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys: {', '.join(prefix + v for v in valid)}"
    return ConfigError(f"unknown key {prefix}{key}; {hint}")


def _convert(kind: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type `kind`, without guessing: a float may be written as an integer, nothing else.

    `kind` may also be an optional plain type, a tuple, names with values (dict), or in a tuple a dataclass, which is
    written as a section.
    """
    origin = typing.get_origin(kind)
    if origin is types.UnionType:
        plain, = (part for part in typing.get_args(kind) if part is not type(None))
        return None if value is None else _convert(plain, value, name)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}, but must be a section with the keys "
                              f"{', '.join(key_types(kind))}")
        return build(kind, value, f"{name}.")
    if origin is tuple:
        parts = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or (parts[-1] is not Ellipsis and len(value) != len(parts)):
            many = "" if parts[-1] is Ellipsis else f" of {len(parts)} values"
            raise ConfigError(f"{name} is {value!r}, but must be a list{many}")
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_convert(k, v, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}, but must hold names and values")
        return {str(key): _convert(typing.get_args(kind)[1], item, f"{name}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}, but must be a finite number")
    if kind is str and value is None:
        return ""
    if type(value) is not kind:
        # YAML takes 12:00:00 for a number, and yes for true
        quotes = ": write it in quotes" if kind is str and isinstance(value, (int, float)) else ""
        raise ConfigError(f"{name} is {value!r}, but must be {_KIND_NAMES.get(kind, kind.__name__)}{quotes}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def key_types(cls: type) -> dict[str, Any]:
    """Key -> annotated type of each field of a dataclass. A trailing underscore of a field is no part of its key:
    the field `from_` is written `from`, which Python keeps for itself."""
    return {name.removesuffix("_"): kind for name, kind in typing.get_type_hints(cls).items()}


def build(cls: type[T], values: Mapping[str, Any], prefix: str = "", base: Path | None = None) -> T:
    """Instance of the dataclass `cls` from nested mappings.

    Where a section's value is text, it names a YAML file that holds the section, looked up beside the run
    file (`base`) and then in the shipped configs/.
    """
    hints, fields = key_types(cls), {field.name.removesuffix("_"): field.name for field in dataclasses.fields(cls)}
    for key in values:
        if key not in hints:
            raise _unknown(str(key), hints, prefix)
    arguments = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if value is None:
                value = {}
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{key} is {value!r}, but must be a section or the name of a file with it")
            arguments[fields[key]] = build(kind, value, f"{prefix}{key}.", base)
        else:
            arguments[fields[key]] = _convert(kind, value, prefix + key)
    return cls(**arguments)


def _resolve_files(values: dict[str, Any], cls: type, base: Path) -> dict[str, Any]:
    hints = key_types(cls)
    resolved = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(hints.get(key)) and isinstance(value, str):
            candidates = [base / value, shipped_file(value.removeprefix("configs/"))]
            path = next((c for c in candidates if c.is_file()), None)
            if path is None:
                raise ConfigError(f"{key}: no file {value!r}, looked at {' and '.join(map(str, candidates))}")
            value = read_mapping(path, key)
        resolved[key] = value
    return resolved


def apply_overrides(values: dict[str, Any], overrides: Iterable[str], cls: type, base: Path) -> dict[str, Any]:
    """`values` with each "key.sub=value" (value in YAML) set, in order. A whole section may be set to a file."""
    values = _resolve_files(values, cls, base)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} must have the form key.sub=value")
        value = parse_yaml(text, f"override {key}")
        section, _, rest = key.partition(".")
        if not rest:
            values.update(_resolve_files({key: value}, cls, base))
            continue
        node = values.get(section)
        if node is None:
            node = {}
        if not isinstance(node, dict):
            raise ConfigError(f"override {key}: {section} is {node!r}, not a section")
        node = dict(node)
        values[section] = node
        while "." in rest:
            head, _, rest = rest.partition(".")
            if not isinstance(node.get(head) or {}, dict):
                raise ConfigError(f"override {key}: {section}.{head} is {node[head]!r}, not a section")
            node[head] = dict(node.get(head) or {})
            node = node[head]
        node[rest] = value
    return values


def load_config(path: str | Path | None, overrides: Iterable[str] = (),
                cls: type[T] | tuple[type[T], ...] = Config) -> T:
    """Configuration from a YAML file (None: defaults) and dotted overrides. Of several schemas the one holds that knows
    most of the keys given, the first of those that know as many.

    Raises ConfigError naming file and line, or the dotted key, the rule and the remedy.
    """
    values: dict[str, Any] = {}
    base = Path.cwd()
    if path is not None:
        file = Path(path)
        if not file.exists() and not file.is_absolute() and file.parts[:1] == ("configs",):
            file = shipped_file(str(Path(*file.parts[1:])))
        values, base = read_mapping(file, "--config"), file.resolve().parent
    schemas = cls if isinstance(cls, tuple) else (cls,)
    values = apply_overrides(values, overrides, schemas[0], base)
    _check_keys(schemas, values)
    return build(max(schemas, key=lambda schema: _known_keys(schema, values)), values, base=base)


def _check_keys(schemas: tuple[type, ...], values: Mapping[str, Any]) -> None:
    """ConfigError for a section's key that none of the schemas knows, with the nearest one of any of them."""
    for name, section in values.items():
        kinds = [kind for kind in (key_types(schema).get(name) for schema in schemas)
                 if dataclasses.is_dataclass(kind)]
        if kinds and isinstance(section, Mapping):
            valid = {key: None for kind in kinds for key in key_types(kind)}
            for key in section:
                if key not in valid:
                    raise _unknown(str(key), valid, f"{name}.")


def _known_keys(schema: type, values: Mapping[str, Any]) -> int:
    hints = key_types(schema)
    return sum(len(section.keys() & key_types(hints[key]).keys()) for key, section in values.items()
               if isinstance(section, Mapping) and dataclasses.is_dataclass(hints.get(key)))


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> "old -> new" for each plain value that two configurations as nested dicts do not share."""
    found: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= changes(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = f"{a!r} -> {b!r}"
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a configuration, as YAML and JSON take them; `build` reads them back."""
    return {f.name.removesuffix("_"): _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value

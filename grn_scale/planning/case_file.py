"""The file of published runs: JSON with the fields that docs/benchmarks/published_runs.json has.

People write such files by hand, so values are read as they are meant: a number in a string, "n/a" for null, "41%".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn_scale.errors import UserError

_WHOLE = ("n_gpus", "layers", "hidden", "heads", "kv_heads", "ffn", "seq_len", "vocab", "micro_batch", "global_batch",
          "tp", "pp", "vpp", "cp", "dp")
_SHARES = ("mfu", "hfu")
_PUBLISHED = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", *_SHARES, "memory_gb", "params_b")
_FLAGS = ("causal", "sp", "ulysses")
_NULL = {"", "-", "?", "null", "none", "n/a", "na", "nan", "unknown", "not stated"}
_FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_TEXT = ("source", "gpu", "sharding", "precision", "memory_kind", "flops_convention", "value_origin", "notes")


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a JSON file {"cases": [...]}, values as they are meant: numbers in strings as numbers, words for
    nothing as null, shares above 1.5 as percent. UserError naming file and case where it is not such a file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    cases = document.get("cases") if isinstance(document, dict) else document
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{path}: holds no cases: it must be {{\"cases\": [{{\"name\": ..., \"source\": ...}}, ...]}}")
    found = []
    for number, case in enumerate(cases):
        if not isinstance(case, dict) or not isinstance(case.get("name"), str):
            raise UserError(f"{path}: case {number + 1} has no name")
        found.append(_meant(case, path))
        _check_numbers(found[-1], path)
    return found


def _meant(case: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A copy of the case with values of the type that their field has."""
    meant = dict(case)
    for field in (*_WHOLE, *_PUBLISHED, "zero_stage", *_FLAGS, *_TEXT):
        if isinstance(meant.get(field), str) and meant[field].strip().lower() in _NULL:
            meant[field] = None
    if isinstance(meant.get("recompute"), bool):
        meant["recompute"] = "full" if meant["recompute"] else "none"
    for field in (*_WHOLE, *_PUBLISHED, "zero_stage", *_FLAGS):
        if isinstance(value := meant.get(field), str):
            meant[field] = _read(value, field in _FLAGS)
    for field in _SHARES:
        if isinstance(value := meant.get(field), (int, float)) and value > 1.5:
            meant[field] = value / 100
    for field in _TEXT:
        if meant.get(field) is not None:
            meant[field] = str(meant[field])
    for field in ("causal", "sp"):
        if meant.get(field) is not None and not isinstance(meant[field], (bool, int)):
            raise UserError(f"{path}: case {case['name']}: {field} is {case[field]!r}, but must be true, false or null")
    return meant


def _read(text: str, flag: bool) -> Any:
    """The number or flag that a string holds; the string itself where it holds none."""
    low = text.strip().lower().replace(",", "").replace("_", "")
    if flag and low in _FLAG_WORDS:
        return _FLAG_WORDS[low]
    try:
        value = float(low.removesuffix("%")) / (100 if low.endswith("%") else 1)
    except ValueError:
        return text
    return int(value) if math.isfinite(value) and value == int(value) else value


def _check_numbers(case: dict[str, Any], path: Path) -> None:
    for field in (*_WHOLE, *_PUBLISHED):
        value = case.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{path}: case {case['name']}: {field} is {value!r}, but must be a number above 0, or null")
        if field in _WHOLE:
            if value != int(value):
                raise UserError(f"{path}: case {case['name']}: {field} is {value!r}, but must be a whole number")
            case[field] = int(value)
    degree = case.get("ulysses")
    if degree is not None and (not isinstance(degree, (int, float)) or degree < 0 or degree != int(degree)):
        raise UserError(f"{path}: case {case['name']}: ulysses is {degree!r}, but must be a degree, true, false "
                        "or null")
    stage = case.get("zero_stage")
    if stage is not None and stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: case {case['name']}: zero_stage is {stage!r}, but must be 0 to 3, or null")

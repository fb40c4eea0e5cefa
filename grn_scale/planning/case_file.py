"""The file of published runs: JSON with the fields that docs/benchmarks/published_runs.json has.

People write such files by hand, so values are read as they are meant: a number in a string, "n/a" for null, "41%". A
value that makes no sense costs itself, not its case: it counts as not stated, and the rows of the case say so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from grn_scale.errors import UserError

_WHOLE = ("n_gpus", "layers", "hidden", "heads", "kv_heads", "ffn", "seq_len", "vocab", "micro_batch", "global_batch",
          "tp", "pp", "vpp", "cp", "dp")
_SHARES = ("mfu", "hfu")
_PUBLISHED = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", *_SHARES, "memory_gb", "params_b")
_NULL = {"", "-", "?", "null", "none", "n/a", "na", "nan", "unknown", "not stated"}
_FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[~≈]? ?(-?[\d.]+(?:e[+-]?\d+)?) ?(%|[a-z][a-z/ ]+)?")
"""With a unit of two letters at least: a single one, as in 8K, may be a factor."""
UNREAD = "unread"
"""Field of a case as it is read: field -> reason for each value that makes no sense."""
_TEXT = ("source", "gpu", "sharding", "precision", "memory_kind", "flops_convention", "value_origin", "notes")


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a JSON file {"cases": [...]}, values as they are meant: numbers in strings as numbers, words for
    nothing as null, shares above 1.5 as percent; what cannot be read is null, too, with the reason under UNREAD.

    UserError naming the file where it holds no cases at all.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    cases = document.get("cases") if isinstance(document, dict) else document
    if not isinstance(cases, list) or not any(isinstance(case, dict) for case in cases):
        raise UserError(f"{path}: holds no cases: it must be {{\"cases\": [{{\"name\": ..., \"source\": ...}}, ...]}}")
    return [_meant(case, number) for number, case in enumerate(cases, 1)]


def _meant(case: Any, number: int) -> dict[str, Any]:
    """A copy of a case with values of the type that their field has."""
    if not isinstance(case, Mapping):
        return {"name": f"case {number}", UNREAD: {"case": f"{_short(case)} is no object"}}
    meant, unread = dict(case), dict[str, str]()
    meant["name"] = str(case.get("name") or f"case {number}")

    def read(fields: Iterable[str], value_of: Callable[[Any], Any]) -> None:
        for field in fields:
            if (value := meant.get(field)) is None or isinstance(value, str) and value.strip().lower() in _NULL:
                meant[field] = None
                continue
            try:
                meant[field] = value_of(value)
            except ValueError as reason:
                meant[field], unread[field] = None, f"{_short(value)} {reason}"

    read(_WHOLE, _whole)
    read(_PUBLISHED, _positive)
    read(_SHARES, lambda value: value / 100 if value > 1.5 else value)
    read(["zero_stage"], _stage)
    read(["causal", "sp"], _flag)
    read(["ulysses"], _degree)
    read(_TEXT, str)
    read(["recompute"], lambda value: ("full" if value else "none") if isinstance(value, bool) else str(value))
    return {**meant, UNREAD: unread}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _number(value: Any) -> float:
    """The number that a value is, or a string holds. ValueError where it is none."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip().lower().replace(",", "").replace("_", ""))
        try:
            value = float(match[1]) / (100 if match[2] == "%" else 1) if match else None
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("is no number")
    return value


def _positive(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError("is not above 0")
    return number


def _whole(value: Any) -> int:
    if (number := _positive(value)) != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _stage(value: Any) -> int:
    if (number := _number(value)) not in (0, 1, 2, 3):
        raise ValueError("is none of the stages 0 to 3")
    return int(number)


def _flag(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in _FLAG_WORDS:
        return _FLAG_WORDS[value.strip().lower()]
    if value not in (True, False):
        raise ValueError("is neither true nor false")
    return bool(value)


def _degree(value: Any) -> bool | int:
    """Of Ulysses: a number of ranks, or whether it is used."""
    if isinstance(value, bool) or isinstance(value, str) and value.strip().lower() in _FLAG_WORDS:
        return _flag(value)
    return _whole(value) if _number(value) else False

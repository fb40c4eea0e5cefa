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
          "tp", "pp", "vpp", "cp", "dp", "gpus_per_node")
_SHARES = ("mfu", "hfu")
_PUBLISHED = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", *_SHARES, "memory_gb")
_NULL = {"", "-", "?", "null", "none", "n/a", "na", "nan", "unknown", "not stated"}
_FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[~≈]? ?(-?[\d.]+(?:e[+-]?\d+)?) ?(%|[kmbt]|[a-z][a-z/ ]+)?")
_FACTORS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
"""Of a number's last letter. Thousands of tokens are 1,024."""
BILLIONS = 1e5
"""From here on `params_b` is taken for a number of parameters, not of billions."""
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

    read(["zero_stage"], _stage)
    read([field for field in _WHOLE if field != "seq_len"], _whole)
    read(["seq_len"], lambda value: _whole(value, thousand=1024))
    read(["params_b"], lambda value: count / 1e9 if (count := _positive(value)) > BILLIONS else count)
    if isinstance(case.get("memory_gb"), str) and "gib" in case["memory_gb"].lower():
        meant["memory_kind"] = f"{case.get('memory_kind') or ''} GiB"
    read((*_PUBLISHED, "network_gbits"), _positive)
    read(_SHARES, lambda value: value / 100 if value > 1.5 else value)
    read(["causal", "sp"], _flag)
    read(["ulysses"], _degree)
    read(_TEXT, str)
    read(["recompute"], _words)
    return {**meant, UNREAD: unread}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _number(value: Any, thousand: float = 1000) -> float:
    """The number that a value is, or a string holds. ValueError where it is none."""
    if isinstance(value, str):
        match = _NUMBER.fullmatch(value.strip().lower().replace(",", "").replace("_", ""))
        try:
            factor = (_FACTORS | {"k": thousand}).get(match[2], 1) if match else 1
            value = float(match[1]) * factor / (100 if match[2] == "%" else 1) if match else None
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("is no number")
    return value


def _positive(value: Any, thousand: float = 1000) -> float:
    if (number := _number(value, thousand)) <= 0:
        raise ValueError("is not above 0")
    return number


def _whole(value: Any, thousand: float = 1000) -> int:
    if (number := _positive(value, thousand)) != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _words(value: Any) -> str:
    """Of recomputation: true and false, or modules, or in somebody's own words."""
    if isinstance(value, bool):
        return "full" if value else "none"
    if isinstance(value, list):
        return ", ".join(sorted(map(str, value))) or "none"
    return str(value)


def _stage(value: Any) -> int:
    """A number, or as in ZeRO-3."""
    if isinstance(value, str) and (match := re.fullmatch(r"(?:zero|stage|[-_ ])*([0-3])", value.strip().lower())):
        return int(match[1])
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

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
from grn_scale.planning.case_text import recompute

_WHOLE = ("n_gpus", "layers", "hidden", "heads", "kv_heads", "ffn", "seq_len", "vocab", "micro_batch", "global_batch",
          "tp", "pp", "vpp", "cp", "dp", "gpus_per_node")
_SHARES = ("mfu", "hfu")
_PUBLISHED = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", *_SHARES, "memory_gb")
_NULL = {"", "-", "?", "null", "none", "n/a", "na", "nan", "unknown", "not stated"}
_FLAG_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NUMBER = re.compile(r"[~≈]? ?(-?[\d.]+(?:e[+-]?\d+)?) ?(%|[kmbt](?![a-z/]))? ?([a-z/][a-z0-9/ .-]*)?")
_FACTORS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
"""Of the letter behind a number. Thousands of tokens are 1,024."""
_SCALED = {"ms": 1e-3, "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "min": 60, "minutes": 60, "h": 3600,
           "gb": 1, "gib": 1, "g": 1, "mb": 1e-3, "mib": 1 / 1024, "tb": 1e3}
"""Seconds, and GB or GiB, of what a unit begins with."""
_UNITS = re.compile(r"[gpt]?flop/?s?|tokens?|tok|sequences?|seqs?|samples?|gpus?|layers?|heads?|stages?|ranks?|nodes?|"
                    r"parameters?|params|gbits?/s|gbps|gb/s|per|a|an|each|of|max|peak|mfu|hfu|"
                    r"steps?|iterations?|iter|/|[-.]")
"""What else may stand behind a number."""
_RATES = {"p": 1e3, "g": 1e-3}
"""Of FLOP/s, where those in 1e12 are the unit."""
BILLIONS = 1e5
"""From here on `params_b` is taken for a number of parameters, not of billions."""
UNREAD = "unread"
"""Field of a case as it is read: field -> reason for each value that makes no sense."""
_TEXT = ("source", "gpu", "sharding", "precision", "memory_kind", "flops_convention", "value_origin", "notes")
_FIELDS = {*_WHOLE, *_PUBLISHED, *_TEXT, "name", "params_b", "zero_stage", "causal", "sp", "ulysses", "recompute",
           "network_gbits", UNREAD}


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
    read(["seq_len"], lambda value: _whole(value, thousand=1024))
    read([field for field in _WHOLE if field not in ("seq_len", "global_batch")], _whole)
    read(["global_batch"], lambda value: _batch(value, meant["seq_len"]))
    read(["params_b"], lambda value: count / 1e9 if (count := _positive(value)) > BILLIONS else count)
    if isinstance(case.get("memory_gb"), str) and re.search("[mgt]ib", case["memory_gb"].lower()):
        meant["memory_kind"] = f"{case.get('memory_kind') or ''} GiB"
    read((*_PUBLISHED, "network_gbits"), _positive)
    read(_SHARES, lambda value: value / 100 if value > 1.5 else value)
    read(["causal", "sp"], _flag)
    read(["ulysses"], _degree)
    read(_TEXT, str)
    read(["recompute"], _words)
    unread |= {field: "is no field of a case" for field in meant.keys() - _FIELDS if meant[field] is not None}
    return {**meant, UNREAD: unread}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."


def _number(value: Any, thousand: float = 1000) -> float:
    """The number that a value is, or a string holds, with its unit. ValueError where it is none."""
    if isinstance(value, str):
        plain = re.sub(r"\([^()]*\)", "", value).strip().lower().replace(",", "").replace("_", "")
        match = _NUMBER.fullmatch(plain)
        try:
            factor = (_FACTORS | {"k": thousand}).get(match[2], 1) * _unit(match[3] or "") if match else 1
            value = float(match[1]) * factor / (100 if match[2] == "%" else 1) if match else None
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("is no number")
    return value


def _unit(words: str) -> float:
    """Factor of what stands behind a number. ValueError where it is no unit that is known."""
    factor = 1.0
    for word in re.findall(r"[gpt]?flop/?s?\b|gbits?/s|gb/s|[a-z]+|\S", words):
        rate = re.fullmatch(r"([gpt])flop.*", word)
        if word not in _SCALED and not _UNITS.fullmatch(word):
            raise ValueError(word)
        if word in _SCALED and words.startswith(word):  # seconds of "tokens/s" are no factor
            factor *= _SCALED[word]
        elif rate:
            factor *= _RATES.get(rate[1], 1)
    return factor


def _positive(value: Any, thousand: float = 1000) -> float:
    if (number := _number(value, thousand)) <= 0:
        raise ValueError("is not above 0")
    return number


def _whole(value: Any, thousand: float = 1000) -> int:
    if (number := _positive(value, thousand)) != int(number):
        raise ValueError("is no whole number")
    return int(number)


def _batch(value: Any, sequence: int | None) -> int:
    """Sequences of a step, also where it is given in tokens."""
    if not isinstance(value, str) or "tok" not in value.lower():
        return _whole(value)
    if sequence is None:
        raise ValueError("is in tokens, of sequences of unknown length")
    return max(1, round(_positive(value) / sequence))


def _words(value: Any) -> str:
    """Of recomputation: true and false, or modules, or in somebody's own words."""
    if isinstance(value, bool):
        return "full" if value else "none"
    words = ", ".join(sorted(map(str, value))) or "none" if isinstance(value, list) else str(value)
    if recompute(words) is None:
        raise ValueError("says nothing of recomputation that is known")
    return words


def _stage(value: Any) -> int:
    """A number, or as in ZeRO-3."""
    match = re.search(r"\b(?:zero|stage)[-_ ]*(?:stage)?[-_ ]*([0-3])\b", str(value).lower())
    if match:
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

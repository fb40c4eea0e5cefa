"""The file of published runs: JSON with the fields that docs/benchmarks/published_runs.json has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn_scale.errors import UserError

_WHOLE = ("n_gpus", "layers", "hidden", "heads", "kv_heads", "ffn", "seq_len", "vocab", "micro_batch", "global_batch",
          "tp", "pp", "vpp", "cp", "dp")
_PUBLISHED = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", "mfu", "hfu", "memory_gb", "params_b")


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a JSON file {"cases": [...]}. UserError naming file and case where it is not one."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from error
    cases = document.get("cases") if isinstance(document, dict) else document
    if not isinstance(cases, list) or not cases:
        raise UserError(f"{path}: holds no cases: it must be {{\"cases\": [{{\"name\": ..., \"source\": ...}}, ...]}}")
    for number, case in enumerate(cases):
        if not isinstance(case, dict) or not isinstance(case.get("name"), str):
            raise UserError(f"{path}: case {number + 1} has no name")
        _check_numbers(case, path)
    return cases


def _check_numbers(case: Mapping[str, Any], path: Path) -> None:
    for field in (*_WHOLE, *_PUBLISHED):
        value = case.get(field)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise UserError(f"{path}: case {case['name']}: {field} is {value!r}, but must be a number above 0, or null")
        if field in _WHOLE and value != int(value):
            raise UserError(f"{path}: case {case['name']}: {field} is {value!r}, but must be a whole number")
    stage = case.get("zero_stage")
    if stage is not None and stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: case {case['name']}: zero_stage is {stage!r}, but must be 0 to 3, or null")

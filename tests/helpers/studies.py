"""Scaling studies of a small model, and the steps that their runs might have taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from grn_scale.studies.results import measure

SMALL = {"model.hidden_size": 32, "model.num_layers": 4, "model.num_heads": 4, "model.ffn_hidden_size": 64,
         "data.packs_per_step": 4, "data.token_budget": 128}


def study_file(folder: Path, **keys: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"set": SMALL, "processes": [1, 2], "repeats": 2, "warmup_steps": 2,
                                    "measured_steps": 9, **keys}, sort_keys=False))
    return path


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "step_seconds": 2.0, "data_wait_seconds": 0.0, "tokens": 100, "tokens_per_second": 50.0,
            **values}


def cell(series: str, processes: int, repeat: int, rate: float, **values: Any) -> dict[str, Any]:
    """A row of results whose job made `rate` tokens a second."""
    row = measure([step(number, tokens=rate * 2, tokens_per_second=rate, forward_backward_seconds=1.5,
                        optimizer_seconds=0.4, fill=0.9, peak_memory_bytes=10**9, peak_memory_of="process")
                   for number in range(1, 12)], 2)
    return {"cell": f"{series}-p{processes}-r{repeat}", "series": series, "size": str(processes),
            "processes": processes, "repeat": repeat, "state": "measured", "reason": "", "nodes": "node1",
            "node_count": 1, "processes_per_node": processes, "torch": "2", "commit": "abc", **row, **values}

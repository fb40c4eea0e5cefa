"""What the planner says of the cells of a study, beside what they measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError
from grn_scale.planning.grn_budget import text_encoder_bytes
from grn_scale.planning.grn_machine import find_machine
from grn_scale.planning.grn_memory import step_memory
from grn_scale.planning.grn_time import step_time
from grn_scale.planning.hardware import find_gpu
from grn_scale.planning.measured import read_measured
from grn_scale.studies.study import Study

COMPUTING = ("matrix products", "attention", "element-wise", "text encoder")
EXCHANGES = ("tensor", "context", "pipeline", "beside each other")
UPDATING = ("ZeRO", "optimizer")
NO_HARDWARE = ("the runs found no GPU, so nothing tells how fast this machine is: measure it "
               "with `grn-scale bench gpu --hardware FILE.yaml` and give --hardware FILE.yaml")


@dataclass(frozen=True)
class Prediction:
    """Of a series and size. Seconds of a step, and bytes of tensors on the fullest GPU."""

    seconds: float
    parts: dict[str, float]
    """computing, exchanges, bubble, update and other; adds up to seconds."""
    tokens_per_second: float
    memory: int
    assumed: tuple[str, ...]


def check_hardware(hardware: str) -> None:
    """ConfigError unless it is empty, a known GPU, or a file that was measured."""
    if hardware.endswith(".yaml"):
        read_measured(Path(hardware))
    elif hardware:
        find_gpu(hardware)


def predict(study: Study, line: Mapping[str, Any], rows: Sequence[Mapping[str, Any]],
            hardware: str) -> Prediction | str:
    """The prediction for a line of `summarize`, or why there is none.

    hardware: name of a GPU, or a file of `grn-scale bench gpu --hardware`; empty: the GPU that the run found.
    """
    row = next(row for row in rows if row["cell"] == line["cell"])
    cell = next(cell for cell in study.cells if cell.name == line["cell"])
    machine_name = hardware or row.get("gpu") or ""
    if not machine_name:
        return NO_HARDWARE
    try:
        config = load_config(study.config_of(cell))
        machine = find_machine(config, machine_name, row.get("node_count") or 1,
                               row.get("processes_per_node") or line["processes"])
    except ConfigError as error:
        return str(error)
    time = step_time(config, machine)
    kinds = {"computing": COMPUTING, "exchanges": EXCHANGES, "bubble": ("bubble",), "update": UPDATING}
    parts = {kind: sum(time.parts.get(name, 0.0) for name in names) for kind, names in kinds.items()}
    known = {name for names in kinds.values() for name in names}
    parts["other"] = sum(seconds for name, seconds in time.parts.items() if name not in known)
    peak = max(stage.bytes["peak"] for stage in step_memory(config, machine.gpus))
    # packs of the run are as full as they were, those of the plan are full
    tokens = time.tokens * (line["fill"] or 1.0)
    return Prediction(time.seconds, parts, tokens / time.seconds,
                      peak + text_encoder_bytes(config, machine.gpus_per_node), tuple(machine.assumed()))

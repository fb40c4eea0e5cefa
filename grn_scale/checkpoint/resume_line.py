"""What a resumed run says about itself in one line: from where, and under which layout then and now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.config.schema import Config


def layout_of(config: Config, world_size: int) -> dict[str, int]:
    """How a run is spread over its processes, as a checkpoint's state keeps it ("layout"); all numbers are >= 1 but
    the ZeRO stage."""
    parallel = config.parallel
    return {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "data": world_size // (parallel.tensor * parallel.pipeline * parallel.context),
            "zero_stage": config.zero.stage, "world_size": world_size, "packs_per_step": config.data.packs_per_step}


def resume_line(checkpoint: Path, saved: Mapping[str, Any], layout: Mapping[str, int], left_out: Sequence[str]) -> str:
    """The line: path, step, samples seen, layouts, what was not restored.

    saved: state of the checkpoint; layout: of this run (`layout_of`); left_out: what the checkpoint has and this run
    did not take, or the other way round.
    """
    then = _describe(saved["layout"]) if "layout" in saved else "a layout it does not name"
    now = _describe(layout)
    return (f"resumed from {checkpoint}: step {saved['step']}, {saved['samples_seen']} samples seen; saved on {then}; "
            f"{'the same now' if then == now else f'now on {now}'}; "
            f"{'not restored: ' + ', '.join(left_out) if left_out else 'nothing left out'}")


def _describe(layout: Mapping[str, int]) -> str:
    return ("tensor {tensor} x pipeline {pipeline} x virtual {virtual_pipeline} x context {context} x data {data}, "
            "ZeRO-{zero_stage}, world size {world_size}, global batch {packs_per_step} packs").format(**layout)

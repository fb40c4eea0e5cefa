"""How many packs a step takes: the global batch, which may grow over the first steps of a run.

A function of the step alone. So every process knows it, a run that is resumed or goes back takes the same number again,
and the packs themselves never change.
"""

from __future__ import annotations

from grn_scale.config.data_schema import DataConfig


def packs_of_step(data: DataConfig, step: int) -> int:
    """Packs that the step takes which follows on `step` updates: data.packs_per_step, with a ramp from
    data.ramp_steps updates on; before, the multiples of data.ramp_start below it in turn, for equally many steps."""
    if not data.ramp_start:
        return data.packs_per_step
    stages = data.packs_per_step // data.ramp_start
    return data.ramp_start * min(stages, 1 + step * (stages - 1) // data.ramp_steps)

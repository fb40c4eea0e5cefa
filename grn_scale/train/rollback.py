"""Going back to the last checkpoint after a loss spike.

Weights, optimizer, moving average and step number are those of the checkpoint again; the sample stream goes on where it
is. So the data read since is left out, nothing is read twice, and a run's next checkpoint holds both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from grn_scale.config.run_schema import SpikesConfig
from grn_scale.errors import DoNotRequeue
from grn_scale.train.metrics import MetricsLog
from grn_scale.train.progress import TrainingProgress

if TYPE_CHECKING:
    from grn_scale.train.loop import Position


class Rollbacks:
    """restore: fills the engine from the newest complete checkpoint of the run and returns its step; None where there
    is none yet. Every process takes part."""

    def __init__(self, settings: SpikesConfig, restore: Callable[[], int | None], metrics: MetricsLog,
                 progress: TrainingProgress) -> None:
        self._limit, self._restore = settings.limit, restore
        self._metrics, self._progress = metrics, progress
        self._count = 0

    def go_back(self, position: Position, loss: float, limit: float) -> Position:
        """Where the run goes on after a spike that ended with `loss` at `position`, above `limit`.

        Without a checkpoint nothing changes but the count. DoNotRequeue after more than spikes.limit spikes.
        """
        self._count += 1
        what = f"loss {loss:.4f} at step {position.step} is a spike (above {limit:.4f}, judged by the steps before)"
        if self._count > self._limit:
            raise DoNotRequeue(
                f"{what}, the {self._count}. since this start (spikes.limit={self._limit}): lower optimizer.lr or "
                "optimizer.clip_norm, look at the samples of these steps, or raise spikes.threshold")
        step = self._restore()
        if step is None:
            self._progress.warn(f"{what}; there is no checkpoint to go back to, so the run goes on")
            return position
        self._progress.warn(f"{what}: back to the checkpoint of step {step}, without the data of the "
                            f"{position.step - step} steps since ({self._count} of {self._limit})")
        self._metrics.write(step, {"event": "rollback", "from_step": position.step, "loss_at_spike": loss})
        self._progress.moved(step)
        return replace(position, step=step)

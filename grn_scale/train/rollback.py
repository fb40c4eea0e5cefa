"""Going back to the last good checkpoint after a loss spike.

Weights, optimizer, moving average and step number are those of the checkpoint again; the sample stream goes on where it
is. So the data read since is left out, nothing is read twice, and a run's next checkpoint holds both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from grn_scale.config.run_schema import SpikesConfig
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, DoNotRequeue
from grn_scale.train.metrics import MetricsLog
from grn_scale.train.progress import TrainingProgress

if TYPE_CHECKING:
    from grn_scale.train.loop import Position


def check_rollback(config: Config) -> None:
    """ConfigError unless a run that goes back finds a checkpoint to go back to."""
    if config.spikes.enabled and config.train.keep_last < 2:
        raise ConfigError("train.keep_last is 1 with spikes.enabled, but the newest checkpoint may hold what a loss "
                          "spike came from, and going back needs the one before: set train.keep_last=2, or "
                          "spikes.enabled=false")


class Rollbacks:
    """restore: fills the engine from the newest complete checkpoint of the run before a step, and returns its own;
    None where there is none. Every process takes part. before: spikes in earlier starts of the run."""

    def __init__(self, settings: SpikesConfig, restore: Callable[[int], int | None], metrics: MetricsLog,
                 progress: TrainingProgress, before: int = 0) -> None:
        self._limit, self._restore = settings.limit, restore
        self._metrics, self._progress = metrics, progress
        self._count = before

    def go_back(self, position: Position, rising_since: int, loss: float, limit: float) -> Position:
        """Where the run goes on after a spike that began with the loss of step `rising_since` and ended with `loss`
        at `position`, above `limit`.

        A checkpoint of the step before the first loss of the spike may hold the update that wrecked the weights, so the
        run goes back behind it. Without such a checkpoint nothing changes but the count, and the run goes on.
        DoNotRequeue after more than spikes.limit spikes; what is in doubt has been set aside by then, too.
        """
        self._count += 1
        what = f"loss {loss:.4f} at step {position.step} is a spike (above {limit:.4f}, judged by the steps before)"
        step = self._restore(rising_since - 1)
        if step is None:
            self._metrics.write(position.step, {"event": "spike", "loss_at_spike": loss})
        else:
            self._metrics.write(step, {"event": "rollback", "from_step": position.step, "loss_at_spike": loss})
        if self._count > self._limit:
            raise DoNotRequeue(
                f"{what}, the {self._count}. of this run (spikes.limit={self._limit}, over all its starts): lower "
                "optimizer.lr or optimizer.clip_norm, look at the samples of these steps, or raise spikes.threshold; "
                "then raise spikes.limit, and go on with --resume auto")
        if step is None:
            self._progress.warn(f"{what}; there is no checkpoint before it to go back to, so the run goes on "
                                f"({self._count} of {self._limit})")
            return position
        self._progress.warn(f"{what}: back to the checkpoint of step {step}, without the data of the "
                            f"{position.step - step} steps since ({self._count} of {self._limit})")
        self._progress.moved(step)
        return replace(position, step=step)

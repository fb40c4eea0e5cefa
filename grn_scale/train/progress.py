"""What a person sees while training runs: one progress line on stderr, on rank 0."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("grn_scale.train")


class TrainingProgress:
    """A context manager; silent where `shown` is false. Without a terminal it logs a line now and then instead."""

    def __init__(self, total: int, start: int, shown: bool) -> None:
        console = Console(stderr=True)
        self.shown, self.every = shown, max(1, total // 50)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not shown or not console.is_terminal)
        self.task = self.bar.add_task("train", total=total, completed=start, status="")

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        status = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  {row['step_seconds']:.2f} s a step"
        status += f"  MFU {row['mfu']:.1%}" if "mfu" in row else "  MFU n/a"
        self.bar.update(self.task, completed=step, status=status)
        if self.shown and self.bar.disable and step % self.every == 0:
            log.info("step %d: %s", step, status)

    def moved(self, step: int) -> None:
        """The run goes on from another step."""
        self.bar.update(self.task, completed=step)

    def warn(self, message: str) -> None:
        """Tell of something once, not on every process."""
        if self.shown:
            log.warning("%s", message)

    def validated(self, step: int, row: Mapping[str, Any]) -> None:
        if self.shown:
            log.info("step %d: validation loss %.4f, bit accuracy %.1f %%", step, row["validation_loss"],
                     100 * row["validation_bit_accuracy"])

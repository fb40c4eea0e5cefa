"""Where sampled pictures go: a folder of their own, and how far their making has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from grn_scale.errors import UserError

SUMMARY = "samples.json"
FILM_STRIP = "refinement.png"


def check_unused(folder: Path) -> None:
    """UserError where the folder holds anything already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output: {folder} is not an empty folder, and samples would overwrite it; give a new one")


def make_folder(folder: Path) -> None:
    """Make the folder where it is missing; UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot make {folder}: {error.strerror}") from error


@contextmanager
def progress_bar(name: str, total: int, visible: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr while the block runs, where it is `visible`; yields what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  console=Console(stderr=True), disable=not visible) as progress:
        task = progress.add_task(name, total=total)
        yield partial(progress.advance, task)

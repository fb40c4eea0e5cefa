"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], total: int, name: str, visible: bool) -> Iterator[T]:
    """The items; a bar of `total` steps runs with them where it is `visible`. Of several processes one shows it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                  console=Console(stderr=True), disable=not visible) as bar:
        yield from bar.track(items, total=total, description=name)

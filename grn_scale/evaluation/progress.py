"""A progress bar on stderr that runs with an iterator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from grn_scale.sampling.output import progress_bar

T = TypeVar("T")


def shown(items: Iterable[T], total: int, name: str, visible: bool) -> Iterator[T]:
    """The items; a bar of `total` steps runs with them where it is `visible`. Of several processes one shows it."""
    with progress_bar(name, total, visible) as advance:
        for item in items:
            yield item
            advance(1)

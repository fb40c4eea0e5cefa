"""Many small files read at once: shared file systems and object stores answer slowly, but many questions at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 16
Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """read(item) of each item, in order, from threads.

    A few times READERS results are there at most that have not been asked for, however many items there are. What
    `read` raises is raised at its item's turn.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="read-ahead") as readers:
        try:
            for item in items:
                waiting.append(readers.submit(read, item))
                if len(waiting) == 2 * READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

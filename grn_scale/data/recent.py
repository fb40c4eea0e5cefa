"""The values used last, shared by threads."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Recent(Generic[K, T]):
    """Keeps the last `size` values used; several threads may ask."""

    def __init__(self, size: int):
        self._size = size
        self._values: OrderedDict[K, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[K], T]) -> T:
        """Value of `key`, made by `make(key)` where it is not at hand. Two threads may both make it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make(key)
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        return value

    def drop(self, key: K) -> None:
        """Forget a value, if it is here."""
        with self._lock:
            self._values.pop(key, None)

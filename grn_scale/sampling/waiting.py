"""Which samples run together: those under way, and the next ones as soon as there is room for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Waiting:
    """The samples that have not begun yet, in their order.

    Together samples may have `most` tokens; one that has more runs alone. Nobody is overtaken, so that what waits does
    not grow old and memory is bounded by `most`.
    """

    def __init__(self, tokens: Sequence[int], most: int) -> None:
        """tokens: of each sample, in every branch it may have."""
        self._tokens, self._most, self._next = tokens, most, 0

    def admit(self, under_way: Iterable[int]) -> range:
        """The samples that begin now, beside those with these numbers."""
        taken = sum(self._tokens[n] for n in under_way)
        first = self._next
        while self._next < len(self._tokens) and (
                taken == 0 or taken + self._tokens[self._next] <= self._most):
            taken += self._tokens[self._next]
            self._next += 1
        return range(first, self._next)

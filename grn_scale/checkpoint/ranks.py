"""Steps that ranks take together, so that what fails on one fails on all and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from grn_scale.errors import UserError

T = TypeVar("T")


class RankError(RuntimeError):
    """A step failed on some rank, and every rank has left it."""


@dataclass(frozen=True)
class Failure:
    """What other ranks learn of an error: its text, and its class where it is meant for people."""

    rank: int
    text: str
    kind: type[UserError] | None

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        error = _for_people(error)
        if isinstance(error, UserError):
            return cls(rank, str(error), type(error))
        return cls(rank, f"{type(error).__name__}: {error}", None)


class Ranks:
    """The processes of a group, or this process alone.

    Carries small Python objects only. On a cluster give a gloo group; a group that a background thread uses
    must be its own.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        """`group` None is the default group, or this process alone where none is initialised (or `alone` asks it)."""
        self.together = not alone and dist.is_available() and dist.is_initialized()
        self.group = group if self.together else None
        self.rank = dist.get_rank(group) if self.together else 0
        self.size = dist.get_world_size(group) if self.together else 1

    def all(self, step: Callable[[], T]) -> list[T]:
        """Result of `step` on every rank, in order, on every rank.

        Where it raises on any rank, every rank raises: a UserError where all errors are of that kind, else a
        RankError, both naming the failed ranks. (A process alone raises the error itself.) An OSError counts as a
        UserError: storage that refuses is no defect.
        """
        if not self.together:
            return [_alone(step)]
        outcome, error = self._try(step)
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, outcome, group=self.group)
        raise_failures([o for o in outcomes if isinstance(o, Failure)], error)
        return outcomes

    def first(self, step: Callable[[], T]) -> T:
        """Result of `step`, run on the group's rank 0 alone, on every rank. An error is raised on all.

        Sent out once: gathering would make room for as much from every rank, and an index of chunks is large.
        """
        if not self.together:
            return _alone(step)
        outcome, error = self._try(step) if self.rank == 0 else (None, None)
        box = [outcome]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        if isinstance(box[0], Failure):
            raise_failures([box[0]], error)
        return box[0]

    def _try(self, step: Callable[[], T]) -> tuple[T | Failure, Exception | None]:
        """What the other ranks learn, and the error to raise once they know."""
        try:
            return step(), None
        except Exception as error:  # carried to the other ranks first, raised by the caller
            return Failure.of(self.rank, error), error


def _alone(step: Callable[[], T]) -> T:
    try:
        return step()
    except OSError as error:
        raise _for_people(error) from error


def _for_people(error: BaseException) -> BaseException:
    if not isinstance(error, OSError):
        return error
    return UserError(f"{error.filename or 'storage'}: {error.strerror or error}; mend that, or choose another folder")


def raise_failures(failures: list[Failure], cause: BaseException | None = None) -> None:
    """Raise one error that says what failed on which rank; nothing where the list is empty."""
    if not failures:
        return
    where: dict[str, list[int]] = {}
    for failure in failures:
        where.setdefault(failure.text, []).append(failure.rank)
    text = "\n".join(f"rank {ranks[0]}{f' and {len(ranks) - 1} more' if len(ranks) > 1 else ''}: {reason}"
                     for reason, ranks in where.items())
    if any(f.kind is None for f in failures):
        raise RankError(text) from cause
    raise failures[0].kind(text if len(where) > 1 else failures[0].text) from cause

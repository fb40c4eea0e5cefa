"""What import, validate and stats share: counted errors, and whether the media of many clips are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

from grn_scale.data.manifest import Clip, ManifestError
from grn_scale.data.media_file import Media
from grn_scale.data.media_file import _read_table as read_members
from grn_scale.data.media_file import _Table as MemberTable
from grn_scale.data.recent import Recent

T = TypeVar("T")

DEFAULT_MAX_ERRORS = 20
BATCH_LINES = 4096
LOOK_THREADS = 16
"""Files of a network file system are looked up side by side: one look takes a millisecond there, mostly waiting."""


@dataclass
class Tally:
    """Errors, all counted by reason, the first `most` kept."""

    most: int = DEFAULT_MAX_ERRORS
    errors: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, error: ManifestError) -> None:
        self.reasons[error.reason] += 1
        if len(self.errors) < self.most:
            self.errors.append(str(error))

    @property
    def bad(self) -> int:
        """Errors in all."""
        return self.reasons.total()

    def by_reason(self) -> dict[str, int]:
        """Reason -> errors, the most frequent first."""
        return dict(self.reasons.most_common())


def batches(items: Iterable[T], size: int = BATCH_LINES) -> Iterator[list[T]]:
    """The items in lists of `size`, the rest in the last."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


class MediaLook:
    """Looks whether media files, and members of tars, are there; use as a context manager. None is decoded.

    A tar's table of members is read once as long as the clips of no more than LOOK_THREADS tars are mixed.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOK_THREADS, thread_name_prefix="look")
        self._tables: Recent[tuple[Path, int, int], MemberTable] = Recent(LOOK_THREADS)

    def __enter__(self) -> MediaLook:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    def missing(self, clips: Sequence[Clip]) -> list[tuple[str, str] | None]:
        """(reason, message) of each clip whose medium cannot be read; None where it is there."""
        files: list[int] = []
        members: dict[Path, list[int]] = {}
        for place, clip in enumerate(clips):
            (files if clip.member is None else members.setdefault(clip.path, [])).append(place)
        # The clips of one tar stay together: its table is then made by one thread.
        parts = [*batches(files, -(-len(clips) // LOOK_THREADS)), *members.values()]
        found: list[tuple[str, str] | None] = [None] * len(clips)
        for part, problems in zip(parts, self._threads.map(lambda part: self._look([clips[i] for i in part]), parts)):
            for place, problem in zip(part, problems):
                found[place] = problem
        return found

    def _look(self, clips: Sequence[Clip]) -> list[tuple[str, str] | None]:
        """As `missing`, for files, or for members of one tar."""
        if clips[0].member is None:
            return [_file_problem(clip.path) for clip in clips]
        tar = clips[0].path
        problem = _file_problem(tar)
        if problem is not None:
            return [problem] * len(clips)
        table = self._tables.get((tar, *Media(str(tar)).stamp()), lambda _: read_members(str(tar)))
        return [None if clip.member in table.places else _member_problem(clip, table) for clip in clips]


def _file_problem(path: Path) -> tuple[str, str] | None:
    try:
        Media(str(path)).stamp()
    except FileNotFoundError:
        if path.suffix.lower() == ".tar" and path.is_dir():
            return "missing_file", f"{path} is a folder, but only a tar file may be named *.tar; rename it"
        return "missing_file", f"no file {path}; relative paths start at the manifest's folder"
    except OSError as error:
        return "unreadable", f"{path}: {error.strerror or error}"
    return None


def _member_problem(clip: Clip, table: MemberTable) -> tuple[str, str]:
    if table.damage:
        return "bad_tar", (f"{clip.path} is no tar, a compressed one, or damaged behind {len(table.places)} files "
                           f"({table.damage}), and {clip.member!a} is not among those")
    return "missing_member", f"{clip.path} has no file {clip.member!a}; names must match letter by letter"


@contextmanager
def counting(name: str, items: Iterable[T]) -> Iterator[Iterator[T]]:
    """The items; while the block runs, a line on stderr counts them."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    def counted() -> Iterator[T]:
        for batch in batches(items):
            yield from batch
            progress.advance(task, len(batch))

    console = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(),
                  console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield counted()

"""A folder and the folders below it, in an order that depends on the names alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from grn_scale.data.manifest import ManifestError


def files(source: Path, suffix: str) -> Iterator[Path | ManifestError]:
    """`source` itself where it is no folder, else the files in it and below it whose names end in `suffix`, a folder's
    own before those of the folders in it. ManifestError is raised where there are none.
    """
    if not source.is_dir():
        yield source.absolute()
        return
    empty = True
    for found in walk(source):
        if isinstance(found, ManifestError):
            yield found
            continue
        folder, names = found
        for name in names:
            if name.endswith(suffix):
                empty = False
                yield folder / name
    if empty:
        raise ManifestError(source, 0, "empty", f"no {suffix} file lies in it or below it")


def walk(root: Path) -> Iterator[tuple[Path, list[str]] | ManifestError]:
    """(folder, sorted names of what is no folder in it) of `root`, then in the same way of each folder in it,
    sorted by name.

    Names that start with a dot are left out. Links are followed; one that leads back to a folder it lies in is an
    error, as is a folder that cannot be listed. ManifestError is raised where that is `root` itself.
    """
    # A stack, not recursion: folders may be nested deeper than Python's calls may.
    waiting = [(root.absolute(), frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = folder.stat()
            with os.scandir(folder) as listed:
                entries = sorted((entry.name, entry.is_dir()) for entry in listed if not entry.name.startswith("."))
        except OSError as error:
            failure = ManifestError(folder, 0, "unreadable", f"cannot list the folder: {error.strerror or error}")
            if folder == root.absolute():
                raise failure from error
            yield failure
            continue
        here = (status.st_dev, status.st_ino)
        if here in above:
            yield ManifestError(folder, 0, "link_loop", "leads back to a folder that it lies in; remove the link")
            continue
        yield folder, [name for name, is_folder in entries if not is_folder]
        waiting += [(folder / name, above | {here}) for name, is_folder in reversed(entries) if is_folder]

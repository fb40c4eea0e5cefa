"""JSONL files with the fields of the official GRN and InfinityStar releases, or with this project's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from grn_scale.data.importers.entry import Entry, ImportOptions
from grn_scale.data.importers.folders import files
from grn_scale.data.manifest import ManifestError, numbered_lines, parse_object


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries of a JSONL file, or of all *.jsonl files in a folder and below it, in the order of `files`.

    Reads: media_root.
    """
    for file in files(source, ".jsonl"):
        if isinstance(file, ManifestError):
            yield file
            continue
        yield from _lines(file, options.media_root or file.parent)


def _lines(file: Path, root: Path) -> Iterator[Entry | ManifestError]:
    try:
        for _, number, raw in numbered_lines(file):
            try:
                yield Entry(parse_object(raw, file, number), root, file, number)
            except ManifestError as error:
                yield error
    except ManifestError as error:  # the file as a whole
        yield error

"""CSV (or tab-separated .tsv) with a header: a column of paths and one of captions, as Open-Sora writes it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from grn_scale.data.importers.entry import CAPTION_NAMES, Entry, ImportOptions, known_fields
from grn_scale.data.manifest import MOST_LINE_BYTES, PATH_FIELDS, ManifestError

PATH_COLUMNS = (*PATH_FIELDS, "file_name", "video")


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries of a table, row by row. Reads: media_root, path_column, caption_column.

    Raises ManifestError where the header lacks a column or quotes do not end: what follows cannot be told apart then.
    """
    source = source.absolute()
    csv.field_size_limit(MOST_LINE_BYTES)  # of the process; the default cuts off at 128 KiB
    try:
        # Bytes that are no UTF-8 become half surrogates, so that they cost their row and not the file.
        with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            yield from _entries(stream, source, options)
    except OSError as error:
        raise ManifestError(source, 0, "unreadable", f"cannot be read: {error.strerror or error}") from error


def _entries(stream: TextIO, source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    rows = _rows(stream, source)
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    path_column = _column(source, header, "path", options.path_column, PATH_COLUMNS)
    caption_column = options.caption_column
    if caption_column or "class_id" not in header:
        caption_column = _column(source, header, "caption", options.caption_column, CAPTION_NAMES)
    for line, row in rows:
        if len(row) != len(header):
            yield ManifestError(source, line, "bad_row", f"has {len(row)} columns, but the header names {len(header)}")
            continue
        if any(not _is_utf8(cell) for cell in row):
            yield ManifestError(source, line, "not_utf8", "not UTF-8 text; save the table as UTF-8")
            continue
        values = dict(zip(header, row))
        yield Entry({"path": values[path_column], **known_fields(values, caption_column)},
                    options.media_root or source.parent, source, line)


def _column(source: Path, header: list[str], what: str, asked: str | None, usual: tuple[str, ...]) -> str:
    names = [asked] if asked else [name for name in usual if name in header]
    if not names or header.count(names[0]) != 1:
        columns = ", ".join(map(ascii, header)) or "none"
        raise ManifestError(source, 1, "no_column", f"no single {what} column {asked or ' or '.join(usual)}; name one "
                                                    f"of the columns with --{what}-column: {columns}")
    return names[0]


def _rows(stream: TextIO, source: Path) -> Iterator[tuple[int, list[str]]]:
    """(line it starts at, cells) of each row that is not empty."""
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_lines(stream, source), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ManifestError(source, line, "bad_quotes", "where the row that starts here ends is not clear "
                                                            f"({error}); mend its quotes") from error
        if row:
            yield line, row


def _lines(stream: TextIO, source: Path) -> Iterator[str]:
    number = 0
    while text := stream.readline(MOST_LINE_BYTES + 1):
        number += 1
        if len(text) > MOST_LINE_BYTES:
            raise ManifestError(source, number, "too_long", f"longer than {MOST_LINE_BYTES} characters; is it a table?")
        yield text


def _is_utf8(cell: str) -> bool:
    try:
        cell.encode()
    except UnicodeEncodeError:
        return False
    return True

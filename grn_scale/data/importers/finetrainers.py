"""finetrainers folders: prompts.txt beside videos.txt, line by line, or metadata.csv or .jsonl with file names."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from grn_scale.data.importers import table
from grn_scale.data.importers.entry import Entry, ImportOptions, decoded_text, known_fields
from grn_scale.data.manifest import ManifestError, numbered_lines, parse_object, reading, split_lines

CAPTION_FILES = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
MEDIA_FILES = ("videos.txt", "video.txt", "images.txt", "image.txt")
TABLES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries of a folder; paths start at the folder. Reads: media_root, caption_column (of metadata).

    Raises ManifestError where the folder does not hold exactly one of the forms, or the two lists differ in length.
    """
    source = source.absolute()
    root = options.media_root or source
    media, captions, tables = ([source / name for name in names if (source / name).is_file()]
                               for names in (MEDIA_FILES, CAPTION_FILES, TABLES))
    if len(media) == len(captions) == 1 and not tables:
        return _paired(media[0], captions[0], root)
    if len(tables) == 1 and not media and not captions:
        if tables[0].suffix == ".csv":
            return table.entries(tables[0], dataclasses.replace(options, path_column=FILE_NAME))
        return _objects(tables[0], root, options.caption_column)
    found = ", ".join(path.name for path in (*media, *captions, *tables)) or "none of them"
    raise ManifestError(source, 0, "bad_folder", f"holds {found}, but must hold one of {', '.join(CAPTION_FILES)} with "
                                                 f"one of {', '.join(MEDIA_FILES)}, or one of {', '.join(TABLES)}")


def _paired(media: Path, captions: Path, root: Path) -> Iterator[Entry | ManifestError]:
    number = 0
    for path, caption in itertools.zip_longest(_lines(media), _lines(captions)):
        number += 1
        if path is None or caption is None:
            short, other = (media, captions) if path is None else (captions, media)
            raise ManifestError(other, number, "unequal_lines", f"{short.name} ends before this line: which caption "
                                                                "belongs to which medium is not known; mend the files")
        try:
            values = {"path": decoded_text(path, media, number), "caption": decoded_text(caption, captions, number)}
        except ManifestError as error:
            yield error
        else:
            yield Entry(values, root, media, number)


def _lines(file: Path) -> Iterator[bytes]:
    """Lines of a list, blank ones at its end left out."""
    blank: list[bytes] = []
    with reading(file) as stream:
        for raw in split_lines(stream):
            blank.append(raw)
            if raw.strip():
                yield from blank
                blank = []


def _objects(file: Path, root: Path, caption: str | None) -> Iterator[Entry | ManifestError]:
    for _, number, raw in numbered_lines(file):
        try:
            values = parse_object(raw, file, number)
        except ManifestError as error:
            yield error
        else:
            yield Entry({"path": values.get(FILE_NAME), **known_fields(values, caption)}, root, file, number)

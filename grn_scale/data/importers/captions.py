"""A folder of media files, each with its caption in a .txt file of the same name beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath

from grn_scale.data.importers.entry import MEDIA_SUFFIXES, Entry, ImportOptions, read_text_file
from grn_scale.data.importers.folders import walk
from grn_scale.data.manifest import ManifestError


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries of the media files in `source` and below it, in the order of `walk`. Reads no option.

    A medium without a caption file is an entry without caption. A caption without medium, and two media with one
    caption, are errors.
    """
    for found in walk(source):
        if isinstance(found, ManifestError):
            yield found
            continue
        folder, names = found
        media: dict[str, list[str]] = {}
        for name in names:
            if PurePath(name).suffix.lower() in MEDIA_SUFFIXES:
                media.setdefault(PurePath(name).stem, []).append(name)
        texts = {PurePath(name).stem: name for name in names if PurePath(name).suffix.lower() == ".txt"}
        for stem in sorted(media.keys() | texts.keys()):
            try:
                yield _entry(folder, media.get(stem, []), texts.get(stem))
            except ManifestError as error:
                yield error


def _entry(folder: Path, media: list[str], text: str | None) -> Entry:
    if not media:
        raise ManifestError(folder / text, 0, "no_media", "a caption without a medium of the same name beside it")
    if len(media) > 1:
        raise ManifestError(folder, 0, "duplicate_stem", f"{', '.join(media)} have the same name but for its end: "
                                                         "which of them a caption means is not clear; rename or remove "
                                                         "one")
    values = {"path": str(folder / media[0])}
    if text is not None:
        values["caption"] = read_text_file(folder / text)
    return Entry(values, folder, folder / media[0])

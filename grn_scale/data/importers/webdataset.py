"""webdataset tars: media with a .txt, .json or .cls of the same name in the same tar. Nothing is unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from grn_scale.data.importers.entry import MEDIA_SUFFIXES, Entry, ImportOptions, decoded_text, known_fields
from grn_scale.data.importers.folders import files
from grn_scale.data.manifest import MOST_LINE_BYTES, ManifestError, parse_object
from grn_scale.data.media_file import _read_table

FACT_SUFFIXES = (".json", ".txt", ".cls")
"""In the order they are read: a .txt overrides the caption of a .json."""


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries of a tar, or of all *.tar in a folder and below it, in the order of `files`; in a tar by its own.

    Reads: caption_column (field of the .json). Facts without medium, several media of one name, and the damage that
    ends a tar early are errors.
    """
    for tar in files(source, ".tar"):
        if isinstance(tar, ManifestError):
            yield tar
            continue
        try:
            table = _read_table(str(tar))
            yield from _samples(tar, table.places, options.caption_column)
        except OSError as error:
            yield ManifestError(tar, 0, "unreadable", f"cannot be read: {error.strerror or error}")
        else:
            if table.damage:
                yield ManifestError(tar, 0, "bad_tar", f"no tar, a compressed one, or damaged behind "
                                                       f"{len(table.places)} files ({table.damage}); copy it again")


def _samples(tar: Path, places: Mapping[str, tuple[int, int]], caption: str | None,
             ) -> Iterator[Entry | ManifestError]:
    samples: dict[str, list[str]] = {}
    for name in places:
        path = PurePosixPath(name)
        if path.suffix.lower() in MEDIA_SUFFIXES or path.suffix.lower() in FACT_SUFFIXES:
            samples.setdefault(name.removesuffix(path.suffix), []).append(name)
    with open(tar, "rb") as stream:
        def read(name: str) -> bytes:
            offset, size = places[name]
            stream.seek(offset)
            return stream.read(min(size, MOST_LINE_BYTES + 1))

        for stem, names in samples.items():
            try:
                yield _entry(tar, stem, names, read, caption)
            except ManifestError as error:
                yield error


def _entry(tar: Path, stem: str, names: list[str], read: Callable[[str], bytes], caption: str | None) -> Entry:
    media = [name for name in names if PurePosixPath(name).suffix.lower() in MEDIA_SUFFIXES]
    where = Path(f"{tar}/{media[0] if media else names[0]}")
    if not media:
        raise ManifestError(where, 0, "no_media", "a caption or class without a medium of the same name in the tar")
    if len(media) > 1:
        raise ManifestError(where, 0, "duplicate_stem", f"{', '.join(map(ascii, media))} have the same name but for "
                                                        "its end: which of them a caption means is not clear")
    values: dict[str, Any] = {}
    for suffix in FACT_SUFFIXES:
        for name in (name for name in names if PurePosixPath(name).suffix.lower() == suffix):
            values |= _facts(Path(f"{tar}/{name}"), suffix, read(name), caption)
    return Entry({"path": f"{tar}/{media[0]}", **values}, tar.parent, where)


def _facts(file: Path, suffix: str, raw: bytes, caption: str | None) -> dict[str, Any]:
    if suffix == ".json":
        return known_fields(parse_object(raw, file, 0), caption)
    text = decoded_text(raw, file)
    if suffix == ".txt":
        return {"caption": text}
    if not text.isascii() or not text.isdecimal():
        raise ManifestError(file, 0, "bad_value", "holds no class number")
    return known_fields({"class_id": text}, caption)

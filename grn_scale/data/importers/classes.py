"""Class folders, as ImageNet has them: the media in and below each folder of the source belong to one class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath

from grn_scale.data.importers.entry import MEDIA_SUFFIXES, Entry, ImportOptions
from grn_scale.data.importers.folders import walk
from grn_scale.data.manifest import ManifestError


def class_names(source: Path) -> list[str]:
    """Names of the folders in `source`, sorted: the place of a name is its class_id. ManifestError for none."""
    try:
        names = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise ManifestError(source, 0, "unreadable", f"cannot list the folder: {error.strerror or error}") from error
    if not names:
        raise ManifestError(source, 0, "no_class", "holds no folder; put the media of each class into one of its own")
    return names


def entries(source: Path, options: ImportOptions) -> Iterator[Entry | ManifestError]:
    """Entries with class_id, class by class. Media beside the class folders are errors. Reads: flips."""
    source = source.absolute()
    ids = {name: number for number, name in enumerate(class_names(source))}
    for found in walk(source):
        if isinstance(found, ManifestError):
            yield found
            continue
        folder, names = found
        for name in names:
            if PurePath(name).suffix.lower() not in MEDIA_SUFFIXES:
                continue
            file = folder / name
            if folder == source:
                yield ManifestError(file, 0, "no_class", "lies beside the class folders; move it into one of them")
                continue
            values = {"path": str(file), "class_id": ids[folder.relative_to(source).parts[0]]}
            yield Entry(values, folder, file)
            if options.flips:
                yield Entry({**values, "flip": True}, folder, file)

"""Other people's datasets as entries of a manifest, one small file a format. No source is changed or unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from grn_scale.data.importers import captions, classes, finetrainers, grn, table, webdataset
from grn_scale.data.importers.entry import Entry, ImportOptions
from grn_scale.data.manifest import ManifestError

__all__ = ["FORMATS", "Entry", "Format", "ImportOptions"]


@dataclass(frozen=True)
class Format:
    """One importer."""

    entries: Callable[[Path, ImportOptions], Iterator[Entry | ManifestError]]
    """Entries of a source, an error in the place of what gives none. Raises ManifestError where nothing can be read."""
    summary: str
    options: tuple[str, ...] = ()
    """Fields of ImportOptions that it reads."""


FORMATS = {
    "grn": Format(grn.entries, "JSONL of GRN, InfinityStar or grn_scale: a file, or a folder of them", ("media_root",)),
    "csv": Format(table.entries, "CSV or TSV with a header, as Open-Sora's",
                  ("media_root", "path_column", "caption_column")),
    "finetrainers": Format(finetrainers.entries, "folder with prompts.txt and videos.txt, or metadata.csv or .jsonl",
                           ("media_root", "caption_column")),
    "webdataset": Format(webdataset.entries, "tar, or folder of tars, of media with .txt, .json or .cls",
                         ("caption_column",)),
    "captions": Format(captions.entries, "folder of media, each with a .txt of the same name beside it"),
    "classes": Format(classes.entries, "folder of class folders (ImageNet style)", ("flips",)),
}

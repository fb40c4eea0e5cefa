"""What the importers have in common: what they yield, what they may be told, and which names they know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.data.manifest import MOST_LINE_BYTES, ManifestError
from grn_scale.data.video_index import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset((".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v"))
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
CAPTION_NAMES = ("caption", "text")
NUMBER_NAMES = ("begin_frame", "end_frame", "fps", "width", "height", "duration", "class_id")
UNKNOWN = frozenset(("", "nan", "none", "null", "na", "n/a"))
"""How tables write that a number is not known, in lower case."""


@dataclass(frozen=True)
class Entry:
    """One clip of a source as a manifest line would have it, and where it stands in the source."""

    values: dict[str, Any]
    """Fields of a manifest line, the path included. Not checked yet."""
    root: Path
    """Absolute folder that a relative path starts at."""
    file: Path
    """File that speaks of the clip, for errors."""
    line: int = 0
    """Line of it; 0: the file as a whole."""


@dataclass(frozen=True)
class ImportOptions:
    """What the user may add to a source. Each importer says which of these it reads."""

    media_root: Path | None = None
    """Absolute folder that relative paths start at; None: the folder of the file that names them."""
    path_column: str | None = None
    """CSV column of the media paths; None: the first of the usual names."""
    caption_column: str | None = None
    """CSV column, or field of a JSON file, of the captions; None: the first of the usual names."""
    flips: bool = False
    """Behind each clip a flipped one."""


def known_fields(values: Mapping[str, Any], caption: str | None) -> dict[str, Any]:
    """Manifest fields out of a table row or a JSON object: the caption, id and whatever number is called as here.

    caption: name of the caption's field; None: the first of CAPTION_NAMES that is there. `num_frames` and `fps` give
    the duration where that is not given. What is no number stays as it is, for the manifest's own check to refuse.
    """
    fields = {name: number for name in NUMBER_NAMES if (number := _number(values.get(name))) is not None}
    frames, fps = _number(values.get("num_frames")), fields.get("fps")
    if not fields.keys() & {"duration", "begin_frame", "end_frame"} and all(
            isinstance(number, (int, float)) and number > 0 for number in (frames, fps)):
        fields["duration"] = frames / fps
    name = caption or next((name for name in CAPTION_NAMES if values.get(name)), CAPTION_NAMES[0])
    texts = {"caption": values.get(name), "id": values.get("id")}
    return {**fields, **{key: text for key, text in texts.items() if text}}


def _number(value: Any) -> Any:
    """The number that a text writes; None where it is not known."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in UNKNOWN:
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def decoded_text(raw: bytes, file: Path, line: int = 0) -> str:
    """Stripped text of a caption. ManifestError where it is not UTF-8 or too long for a manifest line."""
    if len(raw) > MOST_LINE_BYTES:
        raise ManifestError(file, line, "too_long", f"longer than {MOST_LINE_BYTES} bytes, which no caption is")
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ManifestError(file, line, "not_utf8", f"not UTF-8 text ({error.reason}); save it as UTF-8") from error


def read_text_file(path: Path) -> str:
    """Stripped text of a caption file. ManifestError where it cannot be read, or as `decoded_text` does."""
    try:
        with open(path, "rb") as stream:
            return decoded_text(stream.read(MOST_LINE_BYTES + 1), path)
    except OSError as error:
        raise ManifestError(path, 0, "unreadable", f"cannot be read: {error.strerror or error}") from error

"""The manifest: one clip a line as a JSON object, read into `Clip` records with every error named by line.

    {"path": "clips/a.mp4", "caption": "a red circle moves left", "begin_frame": 0, "end_frame": 96, "fps": 24}

Fields of format version 1 (a line may say `"version": 1`; without it the version is 1):

    path         file of a video or an image; a relative one starts at the manifest's folder
    caption      text, or a list of {"type": ..., "content": ...}; or else class_id, an integer
    begin_frame, end_frame   range of frames in display order, the end excluded; default: the whole file
    fps, width, height       what the source has, where it is known
    id           name in reports; default: path and range

The official GRN files are read as well: video_path, image_path, begin_frame_id, end_frame_id, tarsier2_caption,
MiniCPM_V_2_6_caption, long_caption, text, and quality_prompt, which is put behind each caption of a video
(GRN reference, section 5). Fields not named here are ignored; `manifest validate` counts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.errors import UserError

FORMAT_VERSION = 1
PATH_FIELDS = ("path", "video_path", "image_path")
OLD_CAPTIONS = {"tarsier2_caption": "tarsier2", "MiniCPM_V_2_6_caption": "minicpm"}
"""Fields of older video files -> caption type. They count only where `caption` is absent."""
KNOWN_FIELDS = frozenset((
    *PATH_FIELDS, "version", "caption", "class_id", "begin_frame", "end_frame", "begin_frame_id", "end_frame_id", "fps",
    "width", "height", "duration", "id", "quality_prompt", "long_caption", "long_caption_type", "text",
    "short_caption_type", "remote_video_path", *OLD_CAPTIONS))


@dataclass(frozen=True)
class Clip:
    """One line of a manifest."""

    path: Path
    """Absolute path of the video or image file; it need not exist."""
    captions: tuple[tuple[str, str], ...]
    """(type, text) in the order of the file; type is "" where none is given. Empty only with a class_id."""
    class_id: int | None
    begin_frame: int | None
    """First frame, in display order; None: the first of the file."""
    end_frame: int | None
    """Frame after the last; None: the end of the file."""
    fps: float | None
    """Frames a second that the manifest gives for the source."""
    width: int | None
    """Pixels that the manifest gives for the source."""
    height: int | None
    id: str
    line: int
    """Line in the manifest, from 1."""


class ManifestError(UserError):
    """A line that cannot be used. `reason` is one word for counting, `line` counts from 1 (0: the whole file)."""

    def __init__(self, file: Path, line: int, reason: str, message: str):
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")
        self.file, self.line, self.reason = file, line, reason


class _Line:
    """Fields of one line, each read with its type checked."""

    def __init__(self, file: Path, number: int, values: dict[str, Any]):
        self.file, self.number, self.values = file, number, values

    def error(self, reason: str, message: str) -> ManifestError:
        return ManifestError(self.file, self.number, reason, message)

    def first(self, *names: str) -> tuple[str, Any]:
        """Name and value of the first of `names` that is there and not null."""
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def text(self, *names: str) -> str:
        """Stripped text of the first field present; "" for none."""
        name, value = self.first(*names)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.error("bad_type", f"{name} is {value!r}, but must be text")
        return value.strip()

    def whole(self, *names: str, least: int) -> int | None:
        name, value = self.first(*names)
        if value is None:
            return None
        # Tables exported through pandas write integers as 96.0 wherever a column has holes.
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise self.error("bad_value", f"{name} is {value!r}, but must be a whole number of at least {least}")
        return number

    def rate(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.error("bad_value", f"{name} is {value!r}, but must be a number greater than 0")
        return float(value)


def _video_captions(line: _Line) -> list[tuple[str, str]]:
    value = line.values.get("caption")
    if isinstance(value, list):
        captions = []
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise line.error("bad_type", f"caption holds {entry!r}, but each entry must be an object with "
                                             '"content" and, if known, "type"')
            captions.append((str(entry.get("type") or ""), entry["content"].strip()))
    else:
        captions = [("", line.text("caption"))]
    captions = [caption for caption in captions if caption[1]]
    return captions or [(kind, line.text(name)) for name, kind in OLD_CAPTIONS.items() if line.text(name)]


def _captions(line: _Line) -> tuple[tuple[str, str], ...]:
    captions = _video_captions(line)
    if captions:
        quality = line.text("quality_prompt")
        return tuple((kind, f"{text} {quality}" if quality else text) for kind, text in captions)
    for name, kind_name in (("long_caption", "long_caption_type"), ("text", "short_caption_type")):
        if line.text(name):
            return ((line.text(kind_name), line.text(name)),)
    return ()


def parse_line(text: str, file: Path, number: int) -> Clip:
    """Clip of one line. `file` is the manifest (absolute), for errors and relative paths; `number` counts from 1.

    Raises ManifestError saying what is wrong with the line and what to write instead.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ManifestError(file, number, "not_json", f"not a JSON object ({error.msg}, column {error.colno}); "
                                                      "write one object a line") from error
    if not isinstance(values, dict):
        raise ManifestError(file, number, "not_json", f"holds {type(values).__name__}; write one JSON object a line")
    line = _Line(file, number, values)
    version = values.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise line.error("version", f"manifest version {version!r} is unknown; this release reads version "
                                    f"{FORMAT_VERSION}: convert the manifest or use a newer release")
    written = line.text(*PATH_FIELDS)
    if not written:
        raise line.error("no_path", f"no media file; give it as one of {', '.join(PATH_FIELDS)}")
    captions, class_id = _captions(line), line.whole("class_id", least=0)
    if not captions and class_id is None:
        raise line.error("no_caption", 'no caption; add "caption": "..." (or a class_id)')
    begin, end = line.whole("begin_frame", "begin_frame_id", least=0), line.whole("end_frame", "end_frame_id", least=1)
    if end is not None and end <= (begin or 0):
        raise line.error("bad_range", f"end_frame {end} must lie after begin_frame {begin or 0} (the end is excluded)")
    span = "" if begin is None and end is None else f"#{begin or 0}-{'' if end is None else end}"
    return Clip(path=file.parent / written, captions=captions, class_id=class_id, begin_frame=begin, end_frame=end,
                fps=line.rate("fps"), width=line.whole("width", least=1), height=line.whole("height", least=1),
                id=line.text("id") or written + span, line=number)


def numbered_lines(path: str | Path) -> Iterator[tuple[Path, int, str]]:
    """(absolute manifest path, line number from 1, text) of each line that is not blank.

    Raises ManifestError where the file cannot be read, is not UTF-8 or has no line.
    """
    file = Path(path).absolute()
    empty = True
    try:
        with open(file, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    empty = False
                    yield file, number, text
    except OSError as error:
        raise ManifestError(file, 0, "unreadable", f"cannot read the manifest: {error.strerror or error}; "
                                                   "check its path and permissions") from error
    except UnicodeDecodeError as error:
        raise ManifestError(file, number, "not_utf8", f"not UTF-8 text ({error.reason}); save it as UTF-8") from error
    if empty:
        raise ManifestError(file, 0, "empty", "the manifest has no clip; write one JSON object a line")


def read_manifest(path: str | Path) -> Iterator[Clip]:
    """Clips of a manifest, one after the other, so that its size does not matter. Stops at the first bad line.

    Raises ManifestError (a UserError) naming file, line, rule and remedy.
    """
    for file, number, text in numbered_lines(path):
        yield parse_line(text, file, number)


def load_manifest(path: str | Path) -> list[Clip]:
    """All clips of a manifest. Raises as `read_manifest` does."""
    return list(read_manifest(path))

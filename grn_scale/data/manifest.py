"""The manifest: one clip a line as a JSON object, read into `Clip` records with every error named by line.

    {"path": "clips/a.mp4", "caption": "a red circle moves left", "begin_frame": 0, "end_frame": 96, "fps": 24}
    {"path": "shards/0007.tar/clip_12.mp4", "caption": "waves at dusk"}

Fields of format version 1 (a line may say `"version": 1`; without it the version is 1):

    path         file of a video or an image; a relative one starts at the manifest's folder. A path that goes on
                 behind a name ending in .tar means a member of that tar file: what follows the slash is the member's
                 name, letter by letter as the tar lists it (so no folder on the way may be called *.tar)
    caption      text, or a list of {"type": ..., "content": ...}; or else class_id, an integer
    begin_frame, end_frame   range of frames in display order, the end excluded; default: the whole file
    flip         true: a sample of its own, mirrored left to right
    fps, width, height, duration   what the source has, where it is known; duration in seconds, of the range
    id           name in reports; default: path, range and flip

The official GRN files are read as well: video_path, image_path, begin_frame_id, end_frame_id, tarsier2_caption,
MiniCPM_V_2_6_caption, long_caption, text, and quality_prompt, which is put behind each caption of a video
(GRN reference, section 5). Fields not named here are ignored; `manifest validate` counts them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grn_scale.errors import UserError

FORMAT_VERSION = 1
PATH_FIELDS = ("path", "video_path", "image_path")
OLD_CAPTIONS = {"tarsier2_caption": "tarsier2", "MiniCPM_V_2_6_caption": "minicpm"}
"""Fields of older video files -> caption type. They count only where `caption` is absent."""
KNOWN_FIELDS = frozenset((
    *PATH_FIELDS, "version", "caption", "class_id", "begin_frame", "end_frame", "begin_frame_id", "end_frame_id", "fps",
    "width", "height", "duration", "flip", "id", "quality_prompt", "long_caption", "long_caption_type", "text",
    "short_caption_type", "remote_video_path", *OLD_CAPTIONS))
MOST_LINE_BYTES = 1 << 20
"""A longer line is an error: a damaged file without line breaks must not fill the memory."""
MOST_NUMBER = (1 << 31) - 1
FLIP_SUFFIX = "#flip"
"""Ends the default id of a flipped sample."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAR = re.compile(r"(?P<tar>.*?\.tar)/(?P<member>.+)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Clip:
    """One line of a manifest."""

    path: Path
    """Absolute path of the video or image file, or of the tar that holds it; it need not exist."""
    captions: tuple[tuple[str, str], ...]
    """(type, text) in the order of the line; type is "" where none is given. Empty only with a class_id, or where
    the reader allows it."""
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
    member: str | None = None
    """Name in the tar `path`; None: `path` itself is the media file. It is looked up there and never used as a path."""
    flip: bool = False
    """Mirrored left to right."""
    duration: float | None = None
    """Seconds that the manifest gives for the range."""


class ManifestError(UserError):
    """A line that cannot be used. `reason` is one word for counting, `line` counts from 1 (0: the whole file)."""

    def __init__(self, file: Path, line: int, reason: str, message: str):
        text = f"{file}:{line}: {message}" if line else f"{file}: {message}"
        # File names may hold bytes that are no UTF-8, which could not be printed.
        super().__init__(text.encode(errors="backslashreplace").decode())
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
        return "" if value is None else self.checked_text(name, value).strip()

    def checked_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error("bad_type", f"{name} is {_short(value)}, but must be text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error("bad_value", f"{name} is {_short(value)}, but half a surrogate pair (\\ud800 to \\udfff) "
                                          "is no character; write the whole pair, or the character itself") from error
        return value

    def whole(self, *names: str, least: int) -> int | None:
        name, value = self.first(*names)
        if value is None:
            return None
        # Tables exported through pandas write integers as 96.0 wherever a column has holes.
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= MOST_NUMBER:
            raise self.error("bad_value", f"{name} is {_short(value)}, but must be a whole number of at least {least} "
                                          "and below 2^31")
        return number

    def positive(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-6 <= value <= 1e9:
            raise self.error("bad_value", f"{name} is {_short(value)}, but must be a number from 10^-6 to 10^9")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.error("bad_type", f"{name} is {_short(value)}, but must be true or false")


def _short(value: Any) -> str:
    """A value as errors show it."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _video_captions(line: _Line) -> list[tuple[str, str]]:
    value = line.values.get("caption")
    if isinstance(value, list):
        captions = []
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
                raise line.error("bad_type", f"caption holds {_short(entry)}, but each entry must be an object with "
                                             '"content" and, if known, "type"')
            kind = line.checked_text("type of a caption", entry.get("type") or "")
            captions.append((kind.strip(), line.checked_text("content of a caption", entry["content"]).strip()))
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


def _media(line: _Line, root: Path) -> tuple[str, Path, str | None]:
    """(path as written, absolute path of the file, name of the member where the file is a tar)."""
    name, value = line.first(*PATH_FIELDS)
    if value is None or value == "":
        raise line.error("no_path", f"no media file; give it as one of {', '.join(PATH_FIELDS)}")
    written = line.checked_text(name, value)
    if "\0" in written:
        raise line.error("bad_value", f"path is {_short(written)}, but a path holds no NUL character")
    if _URL.match(written):
        raise line.error("url", f"path is {_short(written)}, but URLs are not read; copy the files to storage that all "
                                "workers mount and give their paths")
    inside = _TAR.fullmatch(written)
    if inside is None and written.lower().endswith(".tar"):
        raise line.error("no_member", f"path is {_short(written)}, a tar; name the clip in it: "
                                      f"{_short(f'{written}/MEMBER.mp4')}, or import all of them with "
                                      "`grn-scale manifest import --from webdataset`")
    if inside is None:
        return written, root / written, None
    return written, root / inside["tar"], inside["member"]


def parse_object(raw: bytes, file: Path, number: int) -> dict[str, Any]:
    """The JSON object of one line. ManifestError where it is none."""
    if len(raw) > MOST_LINE_BYTES:
        raise ManifestError(file, number, "too_long", f"longer than {MOST_LINE_BYTES} bytes; write one object a line")
    try:
        values = json.loads(raw.decode("utf-8-sig" if number <= 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise ManifestError(file, number, "not_utf8", f"not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ManifestError(file, number, "not_json", f"not a JSON object ({error.msg}, column {error.colno}); "
                                                      "write one object a line") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists a thousand deep
        raise ManifestError(file, number, "not_json", f"not a usable JSON object ({error}); write one object a line"
                            ) from error
    if not isinstance(values, dict):
        raise ManifestError(file, number, "not_json", f"holds {type(values).__name__}; write one JSON object a line")
    return values


def parse_line(raw: bytes, file: Path, number: int, *, allow_empty_captions: bool = False) -> Clip:
    """Clip of one line. `file` is the manifest (absolute), for errors and relative paths; `number` counts from 1.

    allow_empty_captions: a line with neither caption nor class_id is a clip without caption.
    Raises ManifestError saying what is wrong with the line and what to write instead.
    """
    return clip_of(parse_object(raw, file, number), file, number, allow_empty_captions=allow_empty_captions)


def clip_of(values: dict[str, Any], file: Path, number: int, *, root: Path | None = None,
            allow_empty_captions: bool = False) -> Clip:
    """Clip of a line's object; see `parse_line`. root: folder that a relative path starts at, if not the file's."""
    line = _Line(file, number, values)
    version = values.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise line.error("version", f"manifest version {_short(version)} is unknown; this release reads version "
                                    f"{FORMAT_VERSION}: convert the manifest or use a newer release")
    written, path, member = _media(line, root or file.parent)
    captions, class_id = _captions(line), line.whole("class_id", least=0)
    if not captions and class_id is None and not allow_empty_captions:
        raise line.error("no_caption", 'no caption; add "caption": "..." (or a class_id), or allow clips without '
                                       "(tokenize.allow_empty_captions=true, --allow-empty-captions)")
    begin, end = line.whole("begin_frame", "begin_frame_id", least=0), line.whole("end_frame", "end_frame_id", least=1)
    if end is not None and end <= (begin or 0):
        raise line.error("bad_range", f"end_frame {end} must lie after begin_frame {begin or 0} (the end is excluded)")
    span = "" if begin is None and end is None else f"#{begin or 0}-{'' if end is None else end}"
    flip = line.flag("flip")
    return Clip(path=path, captions=captions, class_id=class_id, begin_frame=begin, end_frame=end,
                fps=line.positive("fps"), width=line.whole("width", least=1), height=line.whole("height", least=1),
                id=line.text("id") or f"{written}{span}{FLIP_SUFFIX if flip else ''}", line=number, member=member,
                flip=flip, duration=line.positive("duration"))


def numbered_lines(path: str | Path) -> Iterator[tuple[Path, int, bytes]]:
    """(absolute manifest path, line number from 1, bytes) of each line that is not blank; see `split_lines`.

    Raises ManifestError where the file cannot be read or has no line.
    """
    file = Path(path).absolute()
    empty = True
    with reading(file) as stream:
        for number, raw in enumerate(split_lines(stream), start=1):
            if not is_blank(raw):
                empty = False
                yield file, number, raw
    if empty:
        raise no_clip(file)


def split_lines(stream: BinaryIO, see: Callable[[bytes], object] = len) -> Iterator[bytes]:
    """The lines of a stream with their line breaks; `see` is called with every byte read, in pieces.

    Memory is bounded: of a line longer than MOST_LINE_BYTES only the start comes, longer than that itself.
    """
    start = b""
    while part := stream.readline(MOST_LINE_BYTES + 1):
        see(part)
        start = start or part
        if part.endswith(b"\n"):
            yield start
            start = b""
    if start:
        yield start


def is_blank(raw: bytes) -> bool:
    """Whether a line is left out; one that is too long never is, whatever it starts with."""
    return raw.isspace() and len(raw) <= MOST_LINE_BYTES


@contextmanager
def reading(file: Path) -> Iterator[BinaryIO]:
    """The manifest as a binary stream; an OSError of opening or reading it becomes a ManifestError."""
    try:
        with open(file, "rb", buffering=1 << 20) as stream:
            yield stream
    except OSError as error:
        raise ManifestError(file, 0, "unreadable", f"cannot read the manifest: {error.strerror or error}; "
                                                   "check its path and permissions") from error


def no_clip(file: Path) -> ManifestError:
    """The error of a manifest without a line."""
    return ManifestError(file, 0, "empty", "the manifest has no clip; write one JSON object a line")


def read_manifest(path: str | Path, *, allow_empty_captions: bool = False) -> Iterator[Clip]:
    """Clips of a manifest, one after the other, so that its size does not matter. Stops at the first bad line.

    Raises ManifestError (a UserError) naming file, line, rule and remedy.
    """
    for file, number, raw in numbered_lines(path):
        yield parse_line(raw, file, number, allow_empty_captions=allow_empty_captions)


def load_manifest(path: str | Path, *, allow_empty_captions: bool = False) -> list[Clip]:
    """All clips of a manifest. Raises as `read_manifest` does."""
    return list(read_manifest(path, allow_empty_captions=allow_empty_captions))

"""grn-scale manifest import: another format's clips as a manifest.

    grn-scale manifest import --from csv clips.csv --output clips.jsonl --media-root /data/videos
    grn-scale manifest import --from captions videos/ --output videos/clips.jsonl --skip-bad
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from grn_scale.atomic import atomic_file, write_json
from grn_scale.command_line import CommandParser
from grn_scale.data.importers import FORMATS, Entry, ImportOptions
from grn_scale.data.importers.classes import class_names
from grn_scale.data.manifest import MOST_LINE_BYTES, Clip, ManifestError, clip_of
from grn_scale.data_pipeline.manifest_checks import DEFAULT_MAX_ERRORS, MediaLook, Tally, batches, counting
from grn_scale.data_pipeline.seen_ids import SeenIds
from grn_scale.errors import EXIT_FAILED, ConfigError, UserError

CLASSES_FILE = "classes.json"
FIELDS = ("class_id", "begin_frame", "end_frame", "fps", "width", "height", "duration")


@dataclass
class Imported:
    """What an import did."""

    output: str
    """"" where nothing was written."""
    clips: int
    """Lines of the manifest."""
    bad: int
    """Entries of the source that gave none."""
    reasons: dict[str, int]
    errors: list[str]
    """The first messages."""


class _Refused(Exception):
    """Leaves the block of the unfinished manifest, which is then removed."""


def import_manifest(kind: str, source: Path, output: Path, options: ImportOptions, *, skip_bad: bool = False,
                    allow_empty_captions: bool = False, max_errors: int = DEFAULT_MAX_ERRORS) -> Imported:
    """Write the clips of `source`, which has the format `kind` of FORMATS, to the manifest `output`.

    A bad entry leaves nothing written, unless `skip_bad`: then it is left out. What is written passes `validate`.
    Raises UserError where the source cannot be read at all, holds no clip, or the output exists.
    """
    output = output.absolute()
    if output.exists():
        raise UserError(f"--output: {output} exists; give another name, or remove it")
    if not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}; make it first")
    classes = _classes(source, output.parent / CLASSES_FILE) if kind == "classes" else None
    tally = Tally(max_errors)
    try:
        with atomic_file(output) as stream, counting("import", FORMATS[kind].entries(source, options)) as entries:
            clips = _write(stream, output, _checked(entries, tally, allow_empty_captions), tally)
            if tally.bad and not skip_bad:
                raise _Refused
            if not clips:
                raise UserError(f"{source} gives no clip" + (f"; the first error: {tally.errors[0]}" if tally.errors
                                                             else f": is it {FORMATS[kind].summary}?"))
            if classes is not None:
                write_json(output.parent / CLASSES_FILE, classes)
    except _Refused:
        return Imported("", 0, tally.bad, tally.by_reason(), tally.errors)
    return Imported(str(output), clips, tally.bad, tally.by_reason(), tally.errors)


def _classes(source: Path, file: Path) -> list[str]:
    """Names of the classes, by class_id. UserError where `file` exists and says something else."""
    names = class_names(source)
    try:
        other = json.loads(file.read_text(encoding="utf-8")) if file.exists() else names
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is in the way and not a list of classes ({error}); move it, or write the manifest "
                        "into another folder") from error
    if other != names:
        raise UserError(f"{file} lists other classes than {source} has; their numbers would be mixed up: write the "
                        "manifest into another folder")
    return names


def _checked(entries: Iterator[Entry | ManifestError], tally: Tally, allow_empty_captions: bool,
             ) -> Iterator[tuple[Entry, Clip]]:
    """The entries whose fields are right and whose media are there, with their clips; the rest go to `tally`."""
    with MediaLook() as look:
        for batch in batches(entries):
            clips: list[Clip | ManifestError] = []
            for entry in batch:
                try:
                    clips.append(entry if isinstance(entry, ManifestError) else clip_of(
                        entry.values, entry.file, entry.line, root=entry.root,
                        allow_empty_captions=allow_empty_captions))
                except ManifestError as error:
                    clips.append(error)
            missing = iter(look.missing([clip for clip in clips if isinstance(clip, Clip)]))
            for entry, clip in zip(batch, clips):
                if isinstance(clip, ManifestError):
                    tally.add(clip)
                elif (problem := next(missing)) is not None:
                    tally.add(ManifestError(entry.file, entry.line, *problem))
                else:
                    yield entry, clip


def _write(stream: BinaryIO, output: Path, clips: Iterator[tuple[Entry, Clip]], tally: Tally) -> int:
    """Lines written. Ids that stood before go to `tally`."""
    written = 0
    seen = SeenIds()
    for entry, clip in clips:
        values = _values(clip, output.parent, entry.values.get("id"))
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        first = seen.first_line(clip_of(values, output, written + 1, allow_empty_captions=True).id, written + 1)
        if first <= written:
            tally.add(ManifestError(entry.file, entry.line, "duplicate_id", "the same clip, or another with its id, "
                                    f"stands before it already (line {first} of the manifest); keep one of them"))
        elif len(line) > MOST_LINE_BYTES:
            tally.add(ManifestError(entry.file, entry.line, "too_long", f"gives a line of more than {MOST_LINE_BYTES} "
                                                                        "bytes; shorten its captions"))
        else:
            stream.write(line)
            written += 1
    return written


def _values(clip: Clip, folder: Path, given_id: Any) -> dict[str, Any]:
    """The manifest line of a clip, for a manifest in `folder`."""
    captions: Any = [{"type": kind, "content": text} for kind, text in clip.captions]
    if len(captions) == 1 and not captions[0]["type"]:
        captions = captions[0]["content"]
    path = _path(clip.path, folder)
    values = {"path": path if clip.member is None else f"{path}/{clip.member}", "caption": captions or None,
              **{name: getattr(clip, name) for name in FIELDS}, "flip": clip.flip or None, "id": given_id or None}
    return {name: value for name, value in values.items() if value is not None}


def _path(media: Path, folder: Path) -> str:
    """`media` relative to `folder` where that means the same file whatever is a link on the way, else absolute."""
    plain = ".." not in media.parts and (media.is_relative_to(folder) or os.path.realpath(folder) == str(folder))
    return os.path.relpath(media, folder) if plain else str(media)


def main(argv: list[str]) -> int:
    """Exit code: 0, or 1 where a bad entry kept the manifest from being written. The result goes to stdout."""
    formats = "".join(f"\n  {name:<13}{form.summary}" for name, form in FORMATS.items())
    parser = CommandParser("manifest import", "Write another format's clips as a manifest. Formats:" + formats,
                           "grn-scale manifest import --from csv clips.csv --output clips.jsonl", configured=False,
                           json=True)
    parser.add_argument("source", metavar="SOURCE", help="file or folder")
    parser.add_argument("--from", dest="kind", required=True, choices=FORMATS, metavar="FORMAT", help="one of these")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL manifest to write; it must not exist")
    parser.add_argument("--media-root", metavar="DIR", help="folder that relative paths start at (default: that of the "
                                                            "file that names them)")
    parser.add_argument("--path-column", metavar="NAME", help="column of the media paths")
    parser.add_argument("--caption-column", metavar="NAME", help="column, or field of a JSON file, of the captions")
    parser.add_argument("--flips", action="store_true", help="add a flipped sample behind each")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad entries out instead of refusing the source")
    parser.add_argument("--allow-empty-captions", action="store_true", help="take clips without caption")
    parser.add_argument("--max-errors", type=int, default=DEFAULT_MAX_ERRORS, metavar="N", help="messages to print")
    options = parser.parse_options(argv)
    given = ImportOptions(Path(options.media_root).absolute() if options.media_root else None, options.path_column,
                          options.caption_column, options.flips)
    for option in dataclasses.fields(given):
        if getattr(given, option.name) and option.name not in FORMATS[options.kind].options:
            readers = ", ".join(name for name, form in FORMATS.items() if option.name in form.options)
            raise ConfigError(f"--{option.name.replace('_', '-')} means nothing for --from {options.kind}; {readers} "
                              "read it")
    result = import_manifest(options.kind, Path(options.source).absolute(), Path(options.output), given,
                             skip_bad=options.skip_bad, allow_empty_captions=options.allow_empty_captions,
                             max_errors=options.max_errors)
    if options.json:
        print(json.dumps(asdict(result), indent=1))
    else:
        _print(result)
    return 0 if result.output else EXIT_FAILED


def _print(result: Imported) -> None:
    for message in result.errors:
        print(message)
    if result.bad > len(result.errors):
        print(f"... and {result.bad - len(result.errors)} more (--max-errors)")
    if result.bad:
        print(f"{result.bad} bad entries: " + ", ".join(f"{name} {count}" for name, count in result.reasons.items()))
    print(f"{result.output}: {result.clips} clips" if result.output else
          "nothing written; mend the source, or leave bad entries out with --skip-bad")

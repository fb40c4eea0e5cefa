"""grn-scale manifest validate: every line of a manifest checked before anything is spent on it.

    grn-scale manifest validate clips.jsonl --max-errors 5
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from grn_scale.command_line import CommandParser
from grn_scale.data.manifest import KNOWN_FIELDS, Clip, ManifestError, clip_of, numbered_lines, parse_object
from grn_scale.data_pipeline.manifest_checks import DEFAULT_MAX_ERRORS, MediaLook, Tally, batches, counting
from grn_scale.data_pipeline.seen_ids import SeenIds
from grn_scale.errors import EXIT_FAILED

MOST_UNKNOWN_FIELDS = 1000
"""Different unknown names that are counted; a damaged file may have one a line."""


@dataclass
class Validation:
    """What `validate` found."""

    manifest: str
    clips: int
    """Lines that can be used."""
    bad_lines: int
    errors: list[str]
    """The first messages, each with file and line."""
    reasons: dict[str, int]
    """All errors, counted by reason."""
    ignored_fields: dict[str, int]
    """Fields no release knows, with the number of lines that have them: often a misspelled name."""


def validate(path: str | Path, max_errors: int = DEFAULT_MAX_ERRORS, *, allow_empty_captions: bool = False,
             ) -> Validation:
    """Every line read and every media file and tar member looked for; none is decoded.

    All errors are counted, the first `max_errors` are told. Memory: 15 bytes a line for the ids (see `SeenIds`).
    Raises ManifestError only where the manifest itself cannot be read or is empty.
    """
    tally = Tally(max_errors)
    ignored: Counter[str] = Counter()
    seen = SeenIds()
    good = 0

    def read(file: Path, number: int, raw: bytes) -> Clip | ManifestError:
        try:
            values = parse_object(raw, file, number)
            clip = clip_of(values, file, number, allow_empty_captions=allow_empty_captions)
        except ManifestError as error:
            return error
        ignored.update(name for name in values.keys() - KNOWN_FIELDS
                       if name in ignored or len(ignored) < MOST_UNKNOWN_FIELDS)
        return clip

    with counting("validate", numbered_lines(path)) as lines, MediaLook() as look:
        for batch in batches(lines):
            found = [read(*line) for line in batch]
            missing = iter(look.missing([clip for clip in found if isinstance(clip, Clip)]))
            for (file, number, _), clip in zip(batch, found):
                if isinstance(clip, ManifestError):
                    tally.add(clip)
                elif (problem := next(missing)) is not None:
                    tally.add(ManifestError(file, number, *problem))
                elif (first := seen.first_line(clip.id, number)) != number:
                    tally.add(ManifestError(file, number, "duplicate_id", f"id {clip.id!r} stands in line {first} "
                                                                          "already; keep one of them"))
                else:
                    good += 1
    return Validation(str(path), good, tally.bad, tally.errors, tally.by_reason(), dict(ignored.most_common()))


def main(argv: list[str]) -> int:
    """Exit code: 0, or 1 where a line is bad. The result goes to stdout."""
    parser = CommandParser("manifest validate", "Check every line of a manifest, and that its media files are there.",
                           "grn-scale manifest validate clips.jsonl --max-errors 5", configured=False, json=True)
    parser.add_argument("file", metavar="FILE", help="JSONL manifest")
    parser.add_argument("--max-errors", type=int, default=DEFAULT_MAX_ERRORS, metavar="N",
                        help="messages to print; all errors are counted")
    parser.add_argument("--allow-empty-captions", action="store_true",
                        help="take clips without caption, as tokenize.allow_empty_captions=true does")
    options = parser.parse_options(argv)
    result = validate(options.file, options.max_errors, allow_empty_captions=options.allow_empty_captions)
    if options.json:
        print(json.dumps(asdict(result), indent=1))
    else:
        _print(result)
    return EXIT_FAILED if result.bad_lines else 0


def _print(result: Validation) -> None:
    for message in result.errors:
        print(message)
    if result.bad_lines > len(result.errors):
        print(f"... and {result.bad_lines - len(result.errors)} more (--max-errors)")
    for name, lines in result.ignored_fields.items():
        print(f"note: field {name!a} of {lines} lines is not known and ignored")
    print(f"{result.manifest}: {result.clips} clips usable, {result.bad_lines} bad lines"
          + "".join(f", {reason} {number}" for reason, number in result.reasons.items()))

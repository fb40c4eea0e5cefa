"""grn-scale manifest: check a manifest before anything is spent on it, or count what it holds.

    grn-scale manifest validate clips.jsonl
    grn-scale manifest stats clips.jsonl --json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grn_scale.command_line import CommandParser, run
from grn_scale.data.buckets import nearest_ratio_key
from grn_scale.data.manifest import KNOWN_FIELDS, Clip, ManifestError, numbered_lines, parse_line, read_manifest
from grn_scale.errors import EXIT_FAILED

DEFAULT_MAX_ERRORS = 20


@dataclass
class Validation:
    """What `validate` found."""

    manifest: str
    clips: int = 0
    """Lines that can be used."""
    errors: list[str] = field(default_factory=list)
    """The first messages, each with file and line."""
    reasons: dict[str, int] = field(default_factory=dict)
    """All errors, counted by reason."""
    ignored_fields: dict[str, int] = field(default_factory=dict)
    """Fields no release knows, with the number of lines that have them: often a misspelled name."""

    @property
    def bad_lines(self) -> int:
        return sum(self.reasons.values())


def validate(path: str | Path, max_errors: int = DEFAULT_MAX_ERRORS) -> Validation:
    """Every line read and every media file looked for; no media file is opened.

    All errors are counted, the first `max_errors` are told. Raises ManifestError only where the manifest itself
    cannot be read or is empty.
    """
    result = Validation(str(path))
    reasons, ignored = Counter(), Counter()
    first_line: dict[str, int] = {}
    for file, number, text in numbered_lines(path):
        try:
            clip = parse_line(text, file, number)
            ignored.update(json.loads(text).keys() - KNOWN_FIELDS)
            if not clip.path.is_file():
                raise ManifestError(file, number, "missing_file", f"no file {clip.path}; relative paths start at the "
                                                                  "manifest's folder")
            if first_line.setdefault(clip.id, number) != number:
                raise ManifestError(file, number, "duplicate_id", f"id {clip.id!r} stands in line "
                                                                  f"{first_line[clip.id]} already; keep one of them")
        except ManifestError as error:
            reasons[error.reason] += 1
            if len(result.errors) < max_errors:
                result.errors.append(str(error))
        else:
            result.clips += 1
    result.reasons, result.ignored_fields = dict(reasons.most_common()), dict(ignored.most_common())
    return result


def _spread(values: list[float]) -> dict[str, float] | None:
    """Count, sum, least, median and largest value; None for no values."""
    if not values:
        return None
    return {"count": len(values), "sum": round(sum(values), 3), "min": round(min(values), 3),
            "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def stats(clips: Iterable[Clip]) -> dict[str, Any]:
    """Counts of a manifest from its lines alone: clips, files, durations where range and rate are given, sizes and
    aspect ratios where given, captions by type and their words.
    """
    files: set[Path] = set()
    seconds, words = [], []
    sizes, ratios, captions = Counter(), Counter(), Counter()
    count = classes = 0
    for clip in clips:
        count += 1
        files.add(clip.path)
        classes += clip.class_id is not None
        if clip.end_frame is not None and clip.fps:
            seconds.append((clip.end_frame - (clip.begin_frame or 0)) / clip.fps)
        if clip.width and clip.height:
            sizes[f"{clip.width}x{clip.height}"] += 1
            ratios[str(nearest_ratio_key(clip.height, clip.width))] += 1
        for kind, text in clip.captions:
            captions[kind or "untyped"] += 1
            words.append(len(text.split()))
    return {"clips": count, "files": len(files), "with_class_id": classes, "seconds": _spread(seconds),
            "sizes": dict(sizes.most_common()), "ratio_keys": dict(ratios.most_common()),
            "captions": dict(captions.most_common()), "caption_words": _spread(words)}


def _print_validation(result: Validation) -> None:
    for message in result.errors:
        print(message)
    if result.bad_lines > len(result.errors):
        print(f"... and {result.bad_lines - len(result.errors)} more (--max-errors)")
    for name, lines in result.ignored_fields.items():
        print(f"note: field {name!r} of {lines} lines is not known and ignored")
    print(f"{result.manifest}: {result.clips} clips usable, {result.bad_lines} bad lines"
          + "".join(f", {reason} {number}" for reason, number in result.reasons.items()))


def _print_stats(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items()) or "-"
        print(f"{name:<14} {'not given' if value is None else value}")


def main(argv: list[str]) -> int:
    """Exit code: 0, or 1 where validation finds a bad line. The result goes to stdout."""
    parser = CommandParser("manifest", "Check a manifest, or count what it holds.",
                           "grn-scale manifest validate clips.jsonl --max-errors 5", configured=False, json=True)
    parser.add_argument("action", choices=("validate", "stats"))
    parser.add_argument("file", metavar="FILE", help="JSONL manifest")
    parser.add_argument("--max-errors", type=int, default=DEFAULT_MAX_ERRORS, metavar="N",
                        help="messages that validate prints; all errors are counted")
    options = parser.parse_options(argv)
    if options.action == "stats":
        values = stats(read_manifest(options.file))
        print(json.dumps(values, indent=1)) if options.json else _print_stats(values)
        return 0
    result = validate(options.file, options.max_errors)
    if options.json:
        print(json.dumps({**asdict(result), "bad_lines": result.bad_lines}, indent=1))
    else:
        _print_validation(result)
    return EXIT_FAILED if result.bad_lines else 0


if __name__ == "__main__":
    sys.exit(run(main))

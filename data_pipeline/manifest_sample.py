"""A few thousand clips spread over a manifest of any size, read without going through it."""

from __future__ import annotations

from pathlib import Path

from grn_scale.data.manifest import Clip, ManifestError, no_clip, parse_line, reading

PLACES = 16
"""Clips of one source stand together, so lines are taken from several places."""
LINES_A_PLACE = 256


def sample_manifest(manifest: Path) -> tuple[list[Clip | None], int]:
    """Up to PLACES * LINES_A_PLACE lines, None for bad ones, and about how many lines the manifest has.

    Exact where the manifest is no longer than that. Raises ManifestError where it cannot be read or has no line.
    """
    found: list[Clip | None] = []
    read = 0
    size = manifest.stat().st_size if manifest.is_file() else 0
    with reading(manifest) as stream:
        places = PLACES if size > PLACES * LINES_A_PLACE * 1024 else 1
        for place in range(places):
            stream.seek(size * place // places)
            if place:
                stream.readline()
            for _ in range(PLACES * LINES_A_PLACE // places):
                raw = stream.readline()
                if not raw.strip():
                    if not raw:
                        break
                    continue
                read += len(raw)
                try:
                    found.append(parse_line(raw, manifest, 0, allow_empty_captions=True))
                except ManifestError:  # it will be quarantined
                    found.append(None)
    if not found:
        raise no_clip(manifest)
    return found, max(len(found), round(size * len(found) / max(1, read)))

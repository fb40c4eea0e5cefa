"""Manifests and lists that are not what they should be: each line is a clip or an error, and nothing else happens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.importers import ImportOptions
from grn_scale.data.manifest import ManifestError
from grn_scale.data.manifest_chunks import chunk_manifest, read_chunk
from grn_scale.data_pipeline.manifest_import import import_manifest
from grn_scale.data_pipeline.manifest_stats import survey
from grn_scale.data_pipeline.manifest_validate import validate
from grn_scale.errors import UserError
from tests.helpers.mutations import MUTATIONS

LINES = [
    {"path": "clips/a.mp4", "caption": "a red circle", "begin_frame": 0, "end_frame": 96, "fps": 24, "width": 640,
     "height": 360, "duration": 4.0},
    {"path": "some.tar/b.mp4", "caption": [{"type": "short", "content": "b"}, {"type": "long", "content": "B"}]},
    {"video_path": "c.mp4", "tarsier2_caption": "seen", "quality_prompt": "fine", "begin_frame_id": 3},
    {"image_path": "d.png", "long_caption": "é ü 漢字", "text": "short"},
    {"path": "e.png", "class_id": 7, "flip": True}]
MANIFEST = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()
TABLE = 'path,caption,fps\na.mp4,"a, b ""c""\nd",24\nb.mp4,plain,\n'.encode()


def mutated(seed: int, data: bytes) -> bytes:
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 3)):
        data = draw.choice(MUTATIONS)(draw, data + b"0", [MANIFEST, TABLE, b"\xff\xfe\x00"])
    return data


def look(seed: int, folder: Path) -> None:
    """Read a mutated manifest in every way, and import a mutated table."""
    manifest = folder / "clips.jsonl"
    manifest.write_bytes(mutated(seed, MANIFEST))
    try:
        chunks = chunk_manifest(manifest, 2)
        entries = [entry for chunk in chunks for entry in read_chunk(manifest, chunk)]
        found = validate(manifest, 3)
        assert found.clips + found.bad_lines == len(entries)
        assert found.bad_lines >= sum(isinstance(entry, ManifestError) for entry in entries)
        survey(manifest, TokenizeConfig(), 4096)
    except UserError as error:
        assert str(manifest) in str(error)
    table, output = folder / "table.csv", folder / "imported.jsonl"
    table.write_bytes(mutated(seed, TABLE))
    try:
        import_manifest("csv", table, output, ImportOptions(), skip_bad=True)
    except UserError as error:
        assert str(error)
    else:
        assert validate(output, 3).bad_lines == validate(output, 3).reasons.get("missing_file", 0)
    assert {path.name for path in folder.iterdir()} <= {"clips.jsonl", "table.csv", "imported.jsonl"}
    output.unlink(missing_ok=True)


def test_mutated_manifests_give_clips_or_errors(tmp_path):
    for seed in range(60):
        look(seed, tmp_path)


@pytest.mark.slow
def test_a_thousand_mutated_manifests_give_clips_or_errors(tmp_path):
    for seed in range(1000, 2000):
        look(seed, tmp_path)

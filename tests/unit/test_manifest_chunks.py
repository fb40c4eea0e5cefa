"""Manifests cut into chunks that are read by themselves."""

from __future__ import annotations

import json

import pytest

from grn_scale.data.manifest import MOST_LINE_BYTES, Clip, ManifestError, load_manifest
from grn_scale.data.manifest_chunks import chunk_manifest, read_chunk


def clip_line(number: int) -> bytes:
    return json.dumps({"path": f"{number}.mp4", "caption": f"clip {number}"}).encode()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \n"])
def test_the_chunks_together_hold_every_clip_once_and_in_order(tmp_path, size, end):
    path = tmp_path / "clips.jsonl"
    lines = [clip_line(number) for number in range(7)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([lines[0], b"", *lines[1:4], b" \r", b"", *lines[4:]]) + end)
    chunks = chunk_manifest(path, size)
    assert [chunk.clips for chunk in chunks] == [min(size, 7 - first) for first in range(0, 7, size)]
    assert all(chunk.offset + chunk.bytes == after.offset for chunk, after in zip(chunks, chunks[1:]))
    assert [clip for chunk in chunks for clip in read_chunk(path, chunk)] == load_manifest(path)


def test_a_bad_line_costs_one_clip_and_keeps_its_place(tmp_path):
    path = tmp_path / "clips.jsonl"
    endless = b"x" * (2 * MOST_LINE_BYTES + 5)
    path.write_bytes(b"\n".join([clip_line(0), b"\xff", clip_line(1), b"{", endless, clip_line(2)]))
    first, second = chunk_manifest(path, 4)
    entries = [*read_chunk(path, first), *read_chunk(path, second)]
    assert [entry.line for entry in entries] == [1, 2, 3, 4, 5, 6]
    errors = [entry for entry in entries if isinstance(entry, ManifestError)]
    assert [error.reason for error in errors] == ["not_utf8", "not_json", "too_long"]
    assert [entry.id for entry in entries if isinstance(entry, Clip)] == ["0.mp4", "1.mp4", "2.mp4"]


def test_a_manifest_that_changed_since_is_refused_where_it_changed(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_bytes(b"\n".join(clip_line(number) for number in range(4)))
    first, second = chunk_manifest(path, 2)
    path.write_bytes(path.read_bytes() + b"\n" + clip_line(4))
    assert len(read_chunk(path, first)) == 2
    with pytest.raises(ManifestError, match="lines 3 and on are not those this run began with"):
        read_chunk(path, second)
    path.write_bytes(b"")
    with pytest.raises(ManifestError, match="not those"):
        read_chunk(path, first)


def test_empty_and_missing_manifests_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(ManifestError, match="no clip"):
        chunk_manifest(tmp_path / "empty.jsonl", 3)
    with pytest.raises(ManifestError, match="cannot read"):
        chunk_manifest(tmp_path / "none.jsonl", 3)
    with pytest.raises(ValueError, match="at least 1"):
        chunk_manifest(tmp_path / "empty.jsonl", 0)


def test_captions_may_be_missing_where_that_is_allowed(tmp_path):
    path = tmp_path / "clips.jsonl"
    path.write_bytes(b'{"path": "a.mp4"}')
    chunk, = chunk_manifest(path, 3)
    assert isinstance(read_chunk(path, chunk)[0], ManifestError)
    assert read_chunk(path, chunk, allow_empty_captions=True)[0].captions == ()

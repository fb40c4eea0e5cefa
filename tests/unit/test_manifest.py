"""Reading, validating and counting manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grn_scale.command_line import run
from grn_scale.data.manifest import Clip, ManifestError, load_manifest, read_manifest
from grn_scale.data_pipeline import manifest as command
from grn_scale.errors import UserError


def write(folder: Path, *lines: dict | str, name: str = "clips.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_own_fields_are_read_and_paths_resolve_against_the_manifest(tmp_path):
    path = write(tmp_path, {"version": 1, "path": "sub/a.mp4", "caption": " a red circle ", "begin_frame": 3,
                            "end_frame": 29, "fps": 24, "width": 640, "height": 480, "id": "first"},
                 "", {"path": "/data/b.mp4", "caption": "b", "class_id": 7})
    first, second = load_manifest(path)
    assert first == Clip(path=tmp_path / "sub" / "a.mp4", captions=(("", "a red circle"),), class_id=None,
                         begin_frame=3, end_frame=29, fps=24.0, width=640, height=480, id="first", line=1)
    assert (second.path, second.class_id, second.line, second.id) == (Path("/data/b.mp4"), 7, 3, "/data/b.mp4")


def test_official_video_fields_are_read(tmp_path):
    path = write(tmp_path,
                 {"video_path": "a.mp4", "begin_frame_id": 0, "end_frame_id": 48, "fps": 16, "duration": 3.0,
                  "caption": [{"type": "short", "content": "cat"}, {"type": "long", "content": "a cat runs"}],
                  "quality_prompt": "best quality", "tarsier2_caption": "unused"},
                 {"video_path": "b.mp4", "tarsier2_caption": "old one", "MiniCPM_V_2_6_caption": "old two"})
    new, old = load_manifest(path)
    assert new.captions == (("short", "cat best quality"), ("long", "a cat runs best quality"))
    assert (new.begin_frame, new.end_frame, new.id) == (0, 48, "a.mp4#0-48")
    assert old.captions == (("tarsier2", "old one"), ("minicpm", "old two"))


def test_official_image_captions_fall_back_to_text(tmp_path):
    path = write(tmp_path, {"image_path": "a.png", "long_caption": "long words", "long_caption_type": "long",
                            "text": "short"},
                 {"image_path": "b.png", "long_caption": "", "text": "short", "short_caption_type": "s"})
    assert [clip.captions for clip in read_manifest(path)] == [(("long", "long words"),), (("s", "short"),)]


def test_a_class_replaces_the_caption(tmp_path):
    clip, = load_manifest(write(tmp_path, {"path": "a.mp4", "class_id": 0}))
    assert clip.captions == () and clip.class_id == 0


@pytest.mark.parametrize(("line", "reason", "message"), [
    ("{not json", "not_json", "column 2"),
    ("[1]", "not_json", "one JSON object a line"),
    ({"caption": "x"}, "no_path", "video_path"),
    ({"path": "a.mp4"}, "no_caption", "class_id"),
    ({"path": "a.mp4", "caption": "  "}, "no_caption", "no caption"),
    ({"path": "a.mp4", "caption": []}, "no_caption", "no caption"),
    ({"path": "a.mp4", "caption": 3}, "bad_type", "must be text"),
    ({"path": "a.mp4", "caption": [{"type": "short"}]}, "bad_type", "content"),
    ({"path": "a.mp4", "caption": "x", "version": 2}, "version", "version 2 is unknown"),
    ({"path": "a.mp4", "caption": "x", "begin_frame": 5, "end_frame": 5}, "bad_range", "after begin_frame 5"),
    ({"path": "a.mp4", "caption": "x", "begin_frame": -1}, "bad_value", "at least 0"),
    ({"path": "a.mp4", "caption": "x", "fps": 0}, "bad_value", "greater than 0"),
    ({"path": "a.mp4", "caption": "x", "width": "640"}, "bad_value", "whole number"),
])
def test_a_bad_line_is_named_with_its_number_and_reason(tmp_path, line, reason, message):
    path = write(tmp_path, {"path": "ok.mp4", "caption": "fine"}, line)
    with pytest.raises(ManifestError, match=message) as caught:
        load_manifest(path)
    assert isinstance(caught.value, UserError)
    assert (caught.value.line, caught.value.reason) == (2, reason)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_missing_empty_and_binary_manifests_are_refused(tmp_path):
    with pytest.raises(ManifestError, match="cannot read the manifest: No such file"):
        load_manifest(tmp_path / "none.jsonl")
    with pytest.raises(ManifestError, match="no clip"):
        load_manifest(write(tmp_path, "", "  "))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"path": "a.mp4", "caption": "x"}\n\xff\xfe\n')
    with pytest.raises(ManifestError, match="binary.jsonl:2: not UTF-8"):
        load_manifest(binary)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"path": "a.mp4", "caption": "x"}\n')
    assert load_manifest(path)[0].captions == (("", "x"),)


def test_whole_floats_count_as_frame_numbers(tmp_path):
    clip, = load_manifest(write(tmp_path, {"path": "a.mp4", "caption": "x", "begin_frame": 4.0, "end_frame": 96.0}))
    assert (clip.begin_frame, clip.end_frame) == (4, 96)


def test_validate_counts_all_errors_and_tells_the_first(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = write(tmp_path, {"path": "a.mp4", "caption": "x", "captoin": "y"}, "{", {"path": "a.mp4"},
                 {"path": "gone.mp4", "caption": "x"}, {"path": "a.mp4", "caption": "again"})
    result = command.validate(path, max_errors=2)
    assert result.clips == 1 and result.bad_lines == 4 and len(result.errors) == 2
    assert result.reasons == {"not_json": 1, "no_caption": 1, "missing_file": 1, "duplicate_id": 1}
    assert result.ignored_fields == {"captoin": 1}

    assert run(command.main, ["validate", str(path), "--max-errors", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{path}:2: not a JSON object" in out and "and 3 more" in out and "captoin" in out
    assert run(command.main, ["validate", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["bad_lines"] == 4


def test_validate_succeeds_on_a_good_manifest(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert run(command.main, ["validate", str(write(tmp_path, {"path": "a.mp4", "caption": "x"}))]) == 0
    assert "1 clips usable, 0 bad lines" in capsys.readouterr().out


def test_stats_count_durations_sizes_and_captions(tmp_path, capsys):
    path = write(tmp_path, {"path": "a.mp4", "caption": "one two", "begin_frame": 8, "end_frame": 24, "fps": 8,
                            "width": 848, "height": 480},
                 {"path": "a.mp4", "id": "2", "caption": [{"type": "long", "content": "one two three four"}]})
    assert run(command.main, ["stats", str(path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["clips"], values["files"]) == (2, 1)
    assert values["seconds"] == {"count": 1, "sum": 2.0, "min": 2.0, "median": 2.0, "max": 2.0}
    assert values["sizes"] == {"848x480": 1} and values["ratio_keys"] == {"0.562": 1}
    assert values["captions"] == {"untyped": 1, "long": 1} and values["caption_words"]["max"] == 4
    assert run(command.main, ["stats", str(path)]) == 0
    assert "clips          2" in capsys.readouterr().out


def test_wrong_usage_and_a_missing_file_have_their_exit_codes(tmp_path, capsys):
    assert run(command.main, ["check", "x"]) == 2
    assert run(command.main, ["stats", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read the manifest" in capsys.readouterr().err

"""Reading, validating and counting manifests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from grn_scale.command_line import run
from grn_scale.data.manifest import MOST_LINE_BYTES, Clip, ManifestError, load_manifest, read_manifest
from grn_scale.data_pipeline import manifest as command
from grn_scale.data_pipeline.manifest_validate import validate
from grn_scale.data_pipeline.seen_ids import LEAST_WAITING, PART_BITS, SeenIds
from grn_scale.errors import UserError


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


def test_a_path_behind_a_tar_names_a_member_letter_by_letter(tmp_path):
    inside, above, absolute, plain = load_manifest(write(
        tmp_path, {"path": "s/a.tar/./x.tar/1.mp4", "caption": "x"}, {"path": "a.TAR/../1.mp4", "caption": "x"},
        {"path": "/data/a.tar//1.mp4", "caption": "x"}, {"path": "a.tar.mp4", "caption": "x"}))
    assert (inside.path, inside.member, inside.id) == (tmp_path / "s/a.tar", "./x.tar/1.mp4", "s/a.tar/./x.tar/1.mp4")
    assert (above.path, above.member) == (tmp_path / "a.TAR", "../1.mp4")
    assert (absolute.path, absolute.member) == (Path("/data/a.tar"), "/1.mp4")
    assert (plain.path, plain.member) == (tmp_path / "a.tar.mp4", None)


def test_a_flipped_clip_is_another_one(tmp_path):
    plain, flipped, named = load_manifest(write(
        tmp_path, {"path": "a.png", "class_id": 1, "flip": False}, {"path": "a.png", "class_id": 1, "flip": True},
        {"path": "a.png", "class_id": 1, "flip": True, "id": "mirror", "duration": 2.5}))
    assert [(clip.flip, clip.id) for clip in (plain, flipped, named)] == [
        (False, "a.png"), (True, "a.png#flip"), (True, "mirror")]
    assert named.duration == 2.5


def test_a_missing_caption_is_an_error_unless_allowed(tmp_path):
    path = write(tmp_path, {"path": "a.mp4", "caption": " "})
    with pytest.raises(ManifestError, match="allow_empty_captions"):
        load_manifest(path)
    assert load_manifest(path, allow_empty_captions=True)[0].captions == ()


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
    ({"path": "a.mp4", "caption": "x", "fps": 0}, "bad_value", "from 10"),
    ({"path": "a.mp4", "caption": "x", "width": "640"}, "bad_value", "whole number"),
    ({"path": "a.mp4", "caption": "x", "class_id": 1 << 31}, "bad_value", "below 2"),
    ({"path": "a.mp4", "caption": "x", "fps": 1e400}, "bad_value", "to 10"),
    ({"path": "a.mp4", "caption": "x", "flip": 1}, "bad_type", "true or false"),
    ({"path": ["a.mp4"], "caption": "x"}, "bad_type", "path is"),
    ({"path": "a\0.mp4", "caption": "x"}, "bad_value", "NUL"),
    ({"path": "a.mp4", "caption": "\ud800"}, "bad_value", "surrogate"),
    ({"path": "a.mp4", "caption": [{"type": 1, "content": "x"}]}, "bad_type", "type of a caption"),
    ({"path": "s3://bucket/a.mp4", "caption": "x"}, "url", "URLs are not read"),
    ({"path": "shards/a.tar", "caption": "x"}, "no_member", "MEMBER"),
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
    result = validate(path, max_errors=2)
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


def test_validate_takes_a_bad_line_for_what_it_is_and_goes_on(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"x")
    path = tmp_path / "clips.jsonl"
    path.write_bytes(b'{"path": "a.mp4", "caption": "x"}\r\n\xff\xfe\r\n' + b"[" * 100_000 + b"\n"
                     + b" " * (MOST_LINE_BYTES + 1) + b'{"path": "a.mp4", "caption": "x", "id": "2"}\n'
                     + b'{"path": "a.mp4", "caption": "x", "width": ' + b"9" * 5000 + b"}\n"
                     + json.dumps({"path": "n" * 5000, "caption": "x"}).encode())
    result = validate(path)
    assert result.clips == 1
    assert result.reasons == {"not_utf8": 1, "not_json": 2, "too_long": 1, "unreadable": 1}


def test_validate_looks_into_tars(tmp_path):
    write_tar(tmp_path / "a.tar", {"x/1.mp4": b"1", "../2.mp4": b"2"})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "folder.tar" / "1.mp4").write_bytes(b"1")
    names = ("a.tar/x/1.mp4", "a.tar/../2.mp4", "a.tar/1.mp4", "cut.tar/other.mp4", "folder.tar/1.mp4", "no.tar/1.mp4")
    result = validate(write(tmp_path, *({"path": name, "caption": "x"} for name in names)))
    assert result.clips == 2
    assert result.reasons == {"missing_member": 1, "bad_tar": 1, "missing_file": 2}
    assert "a.tar has no file '1.mp4'" in result.errors[0] and "is a folder" in result.errors[2]


def test_validate_finds_an_id_again_however_far_apart(tmp_path):
    seen = SeenIds()
    count = (LEAST_WAITING * 4) << PART_BITS >> 4
    assert all(seen.first_line(f"clip {i}", i + 1) == i + 1 for i in range(count))
    assert [seen.first_line(f"clip {i}", count + 9) for i in (0, 77, count - 1)] == [1, 78, count]


def test_wrong_usage_and_a_missing_file_have_their_exit_codes(tmp_path, capsys):
    assert run(command.main, ["check", "x"]) == 2
    assert run(command.main, ["validate", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read the manifest" in capsys.readouterr().err
    assert run(command.main, ["--help"]) == 0
    assert "grn-scale manifest import --from csv" in capsys.readouterr().out

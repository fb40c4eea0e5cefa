"""Importing other formats: what comes out passes validation, what is wrong is counted with its place."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from grn_scale.command_line import run
from grn_scale.data.manifest import ManifestError, load_manifest
from grn_scale.data_pipeline import manifest as command
from grn_scale.data_pipeline.manifest_validate import validate


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"media")


def imported(kind: str, source: Path, capsys, *options: str, code: int = 0) -> tuple[list, dict]:
    """The clips of the manifest that the command writes, and what it prints."""
    output = source.parent / f"out-{kind}.jsonl"
    argv = ["import", "--from", kind, str(source), "--output", str(output), "--json", *options]
    assert run(command.main, argv) == code
    result = json.loads(capsys.readouterr().out)
    if code:
        assert not output.exists() and result["output"] == ""
        return [], result
    assert validate(output, allow_empty_captions=True).bad_lines == 0
    assert result["clips"] == len(load_manifest(output, allow_empty_captions=True))
    return load_manifest(output, allow_empty_captions=True), result


def refused(capsys, *argv: str, code: int = 1) -> str:
    assert run(command.main, ["import", *argv]) == code
    return capsys.readouterr().err


def names(clips: list, folder: Path) -> list[str]:
    return [os.path.relpath(clip.path, folder) for clip in clips]


LONG = "é" * 100 + "名" * 15 + ".mp4"


def test_side_car_captions_are_found_in_all_folders(tmp_path, capsys):
    source = tmp_path / "videos"
    touch(source, "b/2.mp4", "b/1.MKV", "a.b.png", LONG, ".hidden.mp4", "notes.md")
    texts = {"b/2": "two\r\n", "b/1": "\ufeffone", "a.b": "a, b", LONG[:-4]: "long"}
    for name, text in texts.items():
        (source / f"{name}.txt").write_text(text, encoding="utf-8")
    clips, result = imported("captions", source, capsys)
    assert names(clips, source) == ["a.b.png", LONG, "b/1.MKV", "b/2.mp4"]
    assert [clip.captions[0][1] for clip in clips] == ["a, b", "long", "one", "two"]
    assert json.loads((tmp_path / "out-captions.jsonl").read_text().splitlines()[0])["path"] == "videos/a.b.png"


def test_side_car_captions_that_do_not_fit_are_counted_by_reason(tmp_path, capsys):
    source = tmp_path / "videos"
    touch(source, "alone.mp4", "two.mp4", "two.mov", "bad.mp4", "good.mp4", "empty.mp4")
    for name in ("two", "orphan", "good"):
        (source / f"{name}.txt").write_text(name)
    (source / "bad.txt").write_bytes(b"\xff\xfeb")
    (source / "empty.txt").write_text(" ")
    (source / "loop").symlink_to(source)
    (source / os.fsdecode(b"\xff.mp4")).write_bytes(b"media")
    reasons = {"no_caption": 2, "duplicate_stem": 1, "no_media": 1, "not_utf8": 1, "link_loop": 1, "bad_value": 1}
    _, result = imported("captions", source, capsys, code=1)
    assert result["reasons"] == reasons
    assert any(str(source / "bad.txt") in error for error in result["errors"])
    clips, result = imported("captions", source, capsys, "--skip-bad")
    assert names(clips, source) == ["good.mp4"] and result["reasons"] == reasons


def test_clips_without_caption_can_be_allowed(tmp_path, capsys):
    touch(tmp_path / "videos", "a.mp4")
    clips, _ = imported("captions", tmp_path / "videos", capsys, "--allow-empty-captions")
    assert clips[0].captions == ()


def test_class_folders_are_numbered_by_name_and_flips_follow(tmp_path, capsys):
    source = tmp_path / "images"
    touch(source, "n02/b.jpg", "n01/x/a.png", "n10/c.webp")
    (source / "n03").mkdir()
    clips, _ = imported("classes", source, capsys, "--flips")
    assert [(clip.path.name, clip.class_id, clip.flip) for clip in clips] == [
        ("a.png", 0, False), ("a.png", 0, True), ("b.jpg", 1, False), ("b.jpg", 1, True), ("c.webp", 3, False),
        ("c.webp", 3, True)]
    assert json.loads((tmp_path / "classes.json").read_text()) == ["n01", "n02", "n03", "n10"]


def test_classes_of_another_source_are_not_overwritten(tmp_path, capsys):
    touch(tmp_path / "images", "cat/a.png", "beside.png")
    (tmp_path / "classes.json").write_text('["dog"]')
    error = refused(capsys, "--from", "classes", str(tmp_path / "images"), "--output", str(tmp_path / "a.jsonl"))
    assert "lists other classes" in error
    (tmp_path / "classes.json").unlink()
    _, result = imported("classes", tmp_path / "images", capsys, code=1)
    assert result["reasons"] == {"no_class": 1} and not (tmp_path / "classes.json").exists()


def test_a_table_with_quotes_and_extra_columns_is_read(tmp_path, capsys):
    touch(tmp_path / "media", "a.mp4", "b, c.mp4", "d.mp4")
    table = tmp_path / "clips.csv"
    table.write_bytes(("\ufeffpath,text,num_frames,fps,width,height,score\r\n"
                       'a.mp4,"says ""hi"", twice\r\nand leaves",48,24.0,640,360.0,x\r\n\r\n'
                       '"b, c.mp4",plain,,nan,,,\r\n' "d.mp4,last,10,25,64,48,").encode())
    clips, _ = imported("csv", table, capsys, "--media-root", str(tmp_path / "media"))
    assert names(clips, tmp_path / "media") == ["a.mp4", "b, c.mp4", "d.mp4"]
    assert clips[0].captions[0][1] == 'says "hi", twice\r\nand leaves'
    assert (clips[0].duration, clips[0].fps, clips[0].width, clips[0].height) == (2.0, 24.0, 640, 360)
    assert (clips[1].duration, clips[1].fps) == (None, None)


def test_bad_rows_are_named_by_line_and_others_kept(tmp_path, capsys):
    touch(tmp_path, "a.mp4")
    table = tmp_path / "clips.csv"
    table.write_bytes(b"video,prompt,width\na.mp4,ok,1\na.mp4,\"two\nlines\",1\nb.mp4,gone,1\na.mp4,\xff,1\n"
                      b"a.mp4,wide,x\na.mp4,few\n,none,1\na.mp4,,1\nhttps://host/a.mp4,far,1\n")
    clips, result = imported("csv", table, capsys, "--skip-bad", "--caption-column", "prompt")
    assert len(clips) == 1
    assert result["reasons"] == {"duplicate_id": 1, "missing_file": 1, "not_utf8": 1, "bad_value": 1, "bad_row": 1,
                                 "no_path": 1, "no_caption": 1, "url": 1}
    lines = sorted(int(error.removeprefix(f"{table}:").split(":")[0]) for error in result["errors"])
    assert lines == [3, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(("data", "message"), [
    (b"path,title\na.mp4,x\n", "no single caption column"),
    (b"path,path,text\na.mp4,a.mp4,x\n", "no single path column"),
    (b"", "no single path column"),
    (b'path,text\na.mp4,"never ends\n', "clips.csv:2: where the row that starts here ends"),
    ("path,text\n".encode("utf-16"), "no single path column"),
    (b"path,text\n" + b"x" * (1 << 20) + b"yz\n", "longer than"),
])
def test_a_table_that_cannot_be_read_at_all_is_refused(tmp_path, capsys, data, message):
    table = tmp_path / "clips.csv"
    table.write_bytes(data)
    error = refused(capsys, "--from", "csv", str(table), "--output", str(tmp_path / "o.jsonl"), "--skip-bad")
    assert re.search(message, error) and not (tmp_path / "o.jsonl").exists()


def test_finetrainers_lists_go_side_by_side(tmp_path, capsys):
    source = tmp_path / "set"
    touch(source, "videos/0.mp4", "videos/1.mp4")
    (source / "prompts.txt").write_bytes("\ufeffzero\r\neins, zwei ü\r\n\r\n".encode())
    (source / "videos.txt").write_bytes(b"videos/0.mp4\nvideos/1.mp4\n")
    clips, _ = imported("finetrainers", source, capsys)
    assert names(clips, source) == ["videos/0.mp4", "videos/1.mp4"]
    assert [clip.captions[0][1] for clip in clips] == ["zero", "eins, zwei ü"]


def test_finetrainers_lists_of_different_length_are_refused(tmp_path, capsys):
    source = tmp_path / "set"
    touch(source, "0.mp4", "1.mp4")
    (source / "prompt.txt").write_text("zero\n")
    (source / "videos.txt").write_text("0.mp4\n1.mp4\n")
    argv = ("--from", "finetrainers", str(source), "--output", str(tmp_path / "o.jsonl"), "--skip-bad")
    assert "videos.txt:2: prompt.txt ends before this line" in refused(capsys, *argv)
    (source / "captions.txt").write_text("zero\n")
    assert "holds videos.txt, prompt.txt, captions.txt, but must hold one of" in refused(capsys, *argv)
    assert list(tmp_path.glob("o.jsonl*")) == []


@pytest.mark.parametrize(("name", "text"), [
    ("metadata.csv", "file_name,caption\n0.mp4,zero\n1.mp4,one\n"),
    ("metadata.jsonl", '{"file_name": "0.mp4", "text": "zero"}\n{"file_name": "1.mp4", "caption": "one"}\n')])
def test_finetrainers_metadata_is_read(tmp_path, capsys, name, text):
    touch(tmp_path / "set", "0.mp4", "1.mp4")
    (tmp_path / "set" / name).write_text(text)
    clips, _ = imported("finetrainers", tmp_path / "set", capsys)
    assert [clip.captions[0][1] for clip in clips] == ["zero", "one"]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_members_keep_their_names_and_are_not_unpacked(tmp_path, capsys):
    source = tmp_path / "shards"
    facts = json.dumps({"caption": "from json", "fps": 24, "width": 64, "height": "48", "url": "x"}).encode()
    write_tar(source / "b.tar", [("1.mp4", b"m"), ("1.txt", b"one\n"), ("1.json", facts), ("2.json", facts),
                                 ("2.mp4", b"m")])
    write_tar(source / "a/x.tar", [("/abs.mp4", b"m"), ("/abs.txt", b"absolute"), ("../../up.mp4", b"m"),
                                   ("../../up.txt", b"up"), (f"./{LONG}", b"m"), (f"./{LONG[:-4]}.txt", b"long"),
                                   ("img.png", b"m"), ("img.cls", b"7"), ("notes.md", b"-")])
    clips, _ = imported("webdataset", source, capsys)
    assert [(clip.path.name, clip.member) for clip in clips] == [
        ("b.tar", "1.mp4"), ("b.tar", "2.mp4"), ("x.tar", "/abs.mp4"), ("x.tar", "../../up.mp4"),
        ("x.tar", f"./{LONG}"), ("x.tar", "img.png")]
    assert [clip.captions[0][1] if clip.captions else clip.class_id for clip in clips] == [
        "one", "from json", "absolute", "up", "long", 7]
    assert (clips[0].fps, clips[0].width, clips[0].height) == (24.0, 64, 48)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "a", "b.tar", "out-webdataset.jsonl", "shards", "x.tar"]


def test_webdataset_counts_what_gives_no_clip(tmp_path, capsys):
    source = tmp_path / "shards"
    write_tar(source / "a.tar", [("1.mp4", b"m"), ("2.txt", b"alone"), ("3.mp4", b"m"), ("3.mov", b"m"),
                                 ("4.mp4", b"m"), ("4.txt", b"\xff"), ("5.mp4", b"m"), ("5.json", b"{"),
                                 ("6.jpg", b"m"), ("6.cls", b"x"), ("7.mp4", b"m"), ("7.txt", b"fine")])
    (source / "b.tar").write_bytes(b"no tar" * 200)
    write_tar(source / "c.tar", [("1.mp4", b"m"), ("1.txt", b"cut")])
    (source / "c.tar").write_bytes((source / "c.tar").read_bytes()[:2000] + b"x" * 600)
    clips, result = imported("webdataset", source, capsys, "--skip-bad")
    assert [clip.member for clip in clips] == ["7.mp4", "1.mp4"]
    assert result["reasons"] == {"bad_tar": 2, "no_caption": 1, "no_media": 1, "duplicate_stem": 1, "not_utf8": 1,
                                 "not_json": 1, "bad_value": 1}


def test_official_files_of_a_folder_become_one_manifest(tmp_path, capsys):
    source = tmp_path / "jsonl"
    touch(tmp_path / "media", "a.mp4", "b.png")
    (source / "v").mkdir(parents=True)
    (source / "i").mkdir()
    (source / "v" / "1.jsonl").write_text(json.dumps({
        "video_path": "a.mp4", "begin_frame_id": 0, "end_frame_id": 48, "fps": 16, "width": 64, "height": 48,
        "duration": 3.0, "caption": [{"type": "short", "content": "cat"}, {"type": "long", "content": "a cat runs"}],
        "quality_prompt": "sharp", "remote_video_path": "s3://x"}) + "\n\n{\n")
    (source / "i" / "1.jsonl").write_text(json.dumps({
        "image_path": "b.png", "long_caption": "", "text": "bee", "short_caption_type": "s", "id": "bee 1"}))
    (source / "i" / "2.jsonl").write_text("")
    clips, result = imported("grn", source, capsys, "--media-root", str(tmp_path / "media"), "--skip-bad")
    assert result["reasons"] == {"not_json": 1, "empty": 1}
    assert names(clips, tmp_path / "media") == ["b.png", "a.mp4"]
    assert clips[0].captions == (("s", "bee"),) and clips[0].id == "bee 1"
    assert clips[1].captions == (("short", "cat sharp"), ("long", "a cat runs sharp"))
    assert (clips[1].begin_frame, clips[1].end_frame, clips[1].fps, clips[1].duration) == (0, 48, 16.0, 3.0)


def test_importing_a_manifest_again_changes_nothing(tmp_path, capsys):
    touch(tmp_path, "a.mp4", "b.mp4")
    write_tar(tmp_path / "x.tar", [("1.mp4", b"m")])
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in (
        {"path": "a.mp4", "caption": "x", "begin_frame": 3, "flip": True}, {"path": "x.tar/1.mp4", "class_id": 3},
        {"path": "b.mp4", "caption": [{"type": "short", "content": "y"}], "fps": 24.0, "id": "b"})))
    assert imported("grn", path, capsys)[0] == load_manifest(path)


def test_paths_through_links_are_written_whole(tmp_path, capsys):
    touch(tmp_path / "media", "a.mp4")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "media" / "a.txt").write_text("x")
    assert run(command.main, ["import", "--from", "captions", str(tmp_path / "media"), "--output",
                              str(tmp_path / "link" / "c.jsonl")]) == 0
    assert json.loads((tmp_path / "link" / "c.jsonl").read_text())["path"] == str(tmp_path / "media" / "a.mp4")
    assert "1 clips" in capsys.readouterr().out


def test_wrong_usage_says_what_to_do(tmp_path, capsys):
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("x")
    output = str(tmp_path / "o.jsonl")
    usual = ("--from", "captions", str(tmp_path), "--output", output)
    assert "means nothing for --from captions; csv" in refused(capsys, *usual, "--path-column", "x", code=2)
    assert "invalid choice" in refused(capsys, "--from", "cvs", str(tmp_path), "--output", output, code=2)
    assert "cannot list the folder" in refused(capsys, "--from", "captions", str(tmp_path / "no"), "--output", output)
    assert "there is no folder" in refused(capsys, "--from", "captions", str(tmp_path), "--output", f"{output}/x/y")
    (tmp_path / "empty").mkdir()
    assert "gives no clip" in refused(capsys, "--from", "captions", str(tmp_path / "empty"), "--output", output)
    assert "no .tar file" in refused(capsys, "--from", "webdataset", str(tmp_path / "empty"), "--output", output)
    Path(output).write_text("mine")
    assert "exists" in refused(capsys, *usual)
    assert Path(output).read_text() == "mine"


def test_no_source_is_changed(tmp_path, capsys):
    source = tmp_path / "set"
    touch(source, "a.mp4")
    (source / "a.txt").write_text("x")
    write_tar(source / "s.tar", [("1.mp4", b"m"), ("1.txt", b"one")])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    imported("captions", source, capsys)
    imported("webdataset", source, capsys)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()} == before


def test_errors_of_names_that_are_no_utf8_can_be_printed(tmp_path):
    str(ManifestError(tmp_path / os.fsdecode(b"\xff"), 1, "x", "y")).encode()

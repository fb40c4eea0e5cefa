"""Media files inside tars: read where they lie, and everything that can be wrong with the tar told apart."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip, open_media, probe
from grn_scale.data.video_index import index_video
from tests.helpers.media import numbered_frames, numbers, write_video


def clip_of(tar: Path, member: str | None, **more):
    return decode_clip(DecodeRequest(str(tar), 24, 81, height=32, width=64, member=member, **more))


def reason_of(tar: Path, member: str) -> str:
    with pytest.raises(DecodeError) as caught:
        clip_of(tar, member)
    assert str(tar) in caught.value.detail
    return caught.value.reason


def write_tar(path: Path, members: dict[str, Path | bytes], kind: str = "w") -> Path:
    with tarfile.open(path, kind) as tar:
        for name, content in members.items():
            if isinstance(content, Path):
                tar.add(content, name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    made = {"first.mp4": write_video(folder / "first.mp4", numbered_frames(50), options={"g": "12"}),
            "second.mkv": write_video(folder / "second.mkv", numbered_frames(20)),
            "index_first.mp4": write_video(folder / "fast.mp4", numbered_frames(30),
                                           container_options={"movflags": "faststart"})}
    Image.fromarray(numbered_frames(3)[2]).save(folder / "picture.png")
    return made | {"picture.png": folder / "picture.png"}


@pytest.fixture(scope="module")
def tar(media, tmp_path_factory) -> Path:
    members = {"a/first.mp4": media["first.mp4"], "a/first.json": b"{}", "second.mkv": media["second.mkv"],
               "ünï 日本.mp4": media["index_first.mp4"], "picture.png": media["picture.png"],
               "x" * 200 + "/deep.mp4": media["second.mkv"], "text.mp4": b"this is no video\n" * 50}
    path = write_tar(tmp_path_factory.mktemp("tar") / "clips.tar", members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("folder.mp4", tarfile.DIRTYPE), ("link.mp4", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "second.mkv"
            archive.addfile(info)
    return path


@pytest.mark.parametrize(("member", "file"), [
    ("a/first.mp4", "first.mp4"), ("second.mkv", "second.mkv"), ("ünï 日本.mp4", "index_first.mp4"),
    ("picture.png", "picture.png"), ("x" * 200 + "/deep.mp4", "second.mkv")])
def test_a_member_gives_what_the_file_gives(tar, media, member, file):
    before = sorted(tar.parent.iterdir())
    inside, outside = clip_of(tar, member), clip_of(media[file], None)
    np.testing.assert_array_equal(inside.frames, outside.frames)
    assert inside.provenance == outside.provenance
    assert probe(tar, member) == probe(media[file])
    with open_media(tar, member) as stream:
        assert stream.read() == media[file].read_bytes()
        with pytest.raises(io.UnsupportedOperation):
            stream.write(b"")
    assert sorted(tar.parent.iterdir()) == before


def test_segments_of_members_are_found_by_seeking(tar):
    for begin in (0, 13, 37):
        assert numbers(clip_of(tar, "a/first.mp4", begin_frame=begin).frames)[0] == begin
    assert index_video(tar, "a/first.mp4").info.frames == 50 and index_video(tar, "second.mkv").info.frames == 20


def test_what_is_no_readable_member_is_told_apart(tar, tmp_path):
    for member in ("none.mp4", "first.mp4", "folder.mp4", "link.mp4", "../tar/clips.tar", ""):
        assert reason_of(tar, member) == "missing"
    assert reason_of(tar, "text.mp4") == "unreadable"
    assert reason_of(tmp_path / "none.tar", "a.mp4") == "missing"
    assert reason_of(tmp_path, "a.mp4") == "missing"
    with pytest.raises(FileNotFoundError):
        open_media(tar, "none.mp4")
    with pytest.raises(FileNotFoundError):
        open_media(tmp_path)


def test_a_compressed_or_false_tar_is_unreadable(media, tmp_path):
    packed = write_tar(tmp_path / "packed.tar", {"a.mp4": media["first.mp4"]}, "w:gz")
    assert reason_of(packed, "a.mp4") == "unreadable"
    (tmp_path / "text.tar").write_text("no tar" * 500)
    assert reason_of(tmp_path / "text.tar", "a.mp4") == "unreadable"
    (tmp_path / "empty.tar").touch()
    assert reason_of(tmp_path / "empty.tar", "a.mp4") == "unreadable"
    with pytest.raises(DecodeError, match="compressed"):
        probe(packed, "a.mp4")


def test_members_before_the_damage_of_a_tar_are_read(media, tmp_path):
    path = write_tar(tmp_path / "clips.tar", {"a.mp4": media["first.mp4"], "b.mp4": media["first.mp4"],
                                              "c.mp4": media["second.mkv"]})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second, third = archive.getmember("b.mp4"), archive.getmember("c.mp4")
    path.write_bytes(whole[: second.offset_data + second.size // 2])
    assert len(clip_of(path, "a.mp4").frames) == 49
    assert (reason_of(path, "b.mp4"), reason_of(path, "c.mp4")) == ("truncated", "unreadable")

    for damaged in (b"\xff" * 30, b"-00000001" * 4):
        data = bytearray(whole)
        data[third.offset + 120 : third.offset + 120 + len(damaged)] = damaged
        path.write_bytes(data)
        assert len(clip_of(path, "b.mp4").frames) == 49
        assert reason_of(path, "c.mp4") == "unreadable"


def test_of_members_with_one_name_the_last_counts_and_a_changed_tar_is_read_anew(media, tmp_path):
    path = write_tar(tmp_path / "clips.tar", {"a.mp4": media["first.mp4"]})
    assert probe(path, "a.mp4").frames == 50
    with tarfile.open(path, "a") as archive:
        archive.add(media["second.mkv"], "a.mp4")
    assert probe(path, "a.mp4").frames == 20
    shutil.move(write_tar(tmp_path / "new.tar", {"b.mp4": media["second.mkv"]}), path)
    assert reason_of(path, "a.mp4") == "missing"

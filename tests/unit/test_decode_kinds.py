"""Kinds of files that real collections hold: each gives the right frames, or the right reason why there are none."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from grn_scale.data.buckets import choose_bucket
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip, probe
from tests.helpers.media import numbered_frames, numbers, write_edited, write_empty, write_overstated, write_video

AV1 = {"codec": "libsvtav1", "options": {"preset": "12", "crf": "10"}}
HEVC = {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none:crf=8"}}


def clip_of(path: str | Path, **more):
    return decode_clip(DecodeRequest(str(path), 24, 81, **(more or {"height": 32, "width": 64})))


def reason_of(path: Path) -> str:
    with pytest.raises(DecodeError) as caught:
        clip_of(path)
    assert str(path) in caught.value.detail
    return caught.value.reason


def colours(frames: int = 9, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 RGB frames of soft colours that move: every channel has its own shape."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = (np.sin((x + 3 * t) / 20), np.cos((y - 2 * t) / 15), np.sin((x + y) / 25))
    return np.stack([128 + 90 * wave for wave in waves], axis=-1).astype(np.uint8)


@pytest.mark.parametrize(("name", "codec", "pixel_format", "options"), [
    ("av1.mp4", "av1", "yuv420p", AV1),
    ("av1_10_bit.mkv", "av1", "yuv420p10le", AV1 | {"pix_fmt": "yuv420p10le"}),
    ("hevc_10_bit.mp4", "hevc", "yuv420p10le", HEVC | {"pix_fmt": "yuv420p10le"}),
    ("hevc_10_bit_422.mkv", "hevc", "yuv422p10le", HEVC | {"pix_fmt": "yuv422p10le"}),
])
def test_modern_codecs_and_deep_colours_keep_frames_and_colours(tmp_path, name, codec, pixel_format, options):
    clip = clip_of(write_video(tmp_path / name, numbered_frames(30), **options))
    assert numbers(clip.frames) == list(range(29))
    source = colours()
    clip = clip_of(write_video(tmp_path / name, source, **options), height=64, width=96)
    assert (clip.codec, clip.pixel_format, clip.rate_kind) == (codec, pixel_format, "constant")
    # FFmpeg's usual conversion of subsampled colour is up to 1.6 too dark, for 8 bits as for 10.
    difference = clip.frames.astype(int) - source
    assert abs(difference).mean() < 2.5 and abs(difference.mean(axis=(0, 1, 2))).max() < 2
    assert abs(difference).max() < 32


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_and_pixel_shape_come_together_and_before_the_bucket(tmp_path, rotation):
    # Stored 96 x 64 with pixels of half width, so shown 48 wide before it is turned.
    stored = np.full((9, 64, 96, 3), 30, np.uint8)
    stored[:, :16, :24] = 220  # top left
    path = write_video(tmp_path / "phone.mp4", stored, rotation=rotation, pixel_aspect=Fraction(1, 2))
    width, height = (64, 48) if rotation % 180 else (48, 64)
    info = probe(path)
    assert (info.width, info.height, info.rotation, info.pixel_aspect) == (width, height, rotation, 0.5)
    clip = clip_of(path, height=height, width=width)
    corner = {90: (height - 12, 4), 180: (height - 12, width - 12), 270: (4, width - 12)}[rotation]
    shown = clip.frames[0, corner[0] : corner[0] + 8, corner[1] : corner[1] + 8]
    assert abs(shown.astype(int) - 220).max() < 30 and clip.frames.mean() < 60
    bucket = choose_bucket(height, width, 8)
    chosen = clip_of(path, latent_side=8)
    assert chosen.frames.shape[1:3] == (bucket.height, bucket.width) and chosen.ratio_key == bucket.ratio_key
    assert chosen.provenance["rotation"] == rotation and chosen.provenance["pixel_aspect"] == 0.5


def test_an_edit_list_hides_the_frames_it_cuts(tmp_path):
    path = write_edited(tmp_path / "edited.mp4", numbered_frames(30), hidden=6)
    assert probe(path).frames == 24
    assert numbers(clip_of(path).frames) == list(range(6, 27))
    assert numbers(clip_of(path, begin_frame=10, height=32, width=64).frames) == list(range(16, 29))


def test_a_variable_rate_in_matroska_goes_by_time(tmp_path):
    times = [0, 40, 80, 300, 340, 380, 600, 1000, 1040, 1400]
    path = write_video(tmp_path / "variable.mkv", numbered_frames(len(times)), fps=25, milliseconds=times)
    clip = decode_clip(DecodeRequest(str(path), 5, 81, height=32, width=64))
    assert numbers(clip.frames) == [0, 3, 5, 6, 6]
    assert clip.rate_kind == clip.provenance["rate_kind"] == "variable"
    assert clip.worst_timestamp_error_seconds == pytest.approx(0.2, abs=0.002)


def test_a_stream_without_frames_and_one_that_promises_too_many_are_refused(tmp_path):
    assert reason_of(write_empty(tmp_path / "empty.mp4")) == "zero_frames"
    path = write_overstated(tmp_path / "overstated.avi", numbered_frames(20), promised=33)
    assert reason_of(path) == "truncated"
    with pytest.raises(DecodeError, match="promises 33 frames, but holds 20"):
        probe(path)


def test_odd_sizes_of_subsampled_colour_keep_their_last_row_and_column(tmp_path):
    source = colours(5, 47, 91)
    path = write_video(tmp_path / "odd.webm", source, codec="libvpx-vp9", options={"cpu-used": "8", "crf": "4"})
    clip = clip_of(path, height=47, width=91)
    assert (clip.source_width, clip.source_height) == (91, 47)
    assert abs(clip.frames[:, -1].astype(int) - source[:, -1]).mean() < 6
    assert abs(clip.frames[:, :, -1].astype(int) - source[:, :, -1]).mean() < 6


def test_4k_is_brought_to_size(tmp_path):
    path = write_video(tmp_path / "4k.mp4", numbered_frames(5, 2160, 3840), options={"preset": "ultrafast"})
    clip = clip_of(path, latent_side=16)
    assert clip.frames.shape == (5, 192, 336, 3) and numbers(clip.frames) == list(range(5))
    assert (clip.provenance["width"], clip.provenance["height"]) == (3840, 2160)


@pytest.mark.parametrize("name", [
    "日本語 Ünïcode 🎬 #1%20?.mp4", "ü" * 125 + ".mp4", "x" * 251 + ".mp4", "concat:a|b.mp4", "-i.mp4",
    "line\nbreak.mp4", os.fsdecode(b"not \xff\xfe utf-8.mp4"),
])
def test_any_file_name_will_do(tmp_path, monkeypatch, name):
    write_video(tmp_path / "plain.mp4", numbered_frames(9)).rename(tmp_path / name)
    assert numbers(clip_of(tmp_path / name).frames) == list(range(9))
    monkeypatch.chdir(tmp_path)  # a relative name must not be taken for an address
    assert numbers(clip_of(name).frames) == list(range(9))
    with pytest.raises(DecodeError, match="missing"):
        clip_of(f"{name[:-4]}\0.mp4")


def test_a_flipped_clip_is_the_exact_mirror_of_the_clip(tmp_path):
    path = write_video(tmp_path / "clip.mp4", colours(9, 64, 96))
    for size in ({"height": 64, "width": 96}, {"height": 48, "width": 48}, {"height": 61, "width": 33},
                 {"latent_side": 4}):
        plain, flipped = clip_of(path, **size), clip_of(path, **size, flip=True)
        np.testing.assert_array_equal(flipped.frames, plain.frames[:, :, ::-1])


def test_cutting_out_equals_resizing_to_the_same_size(tmp_path):
    from PIL import Image

    source = colours(5, 64, 96)
    path = write_video(tmp_path / "clip.mp4", source)
    whole = clip_of(path, height=64, width=96).frames
    cut = clip_of(path, height=64, width=80).frames
    resized = Image.fromarray(whole[0]).resize((80, 64), Image.Resampling.LANCZOS, box=(8, 0, 88, 64))
    np.testing.assert_array_equal(cut, whole[:, :, 8:88])
    np.testing.assert_array_equal(cut[0], np.asarray(resized))


def test_provenance_is_plain_json_and_leaves_out_square_pixels(tmp_path):
    path = write_video(tmp_path / "clip.mp4", numbered_frames(9))
    assert json.loads(json.dumps(clip_of(path).provenance)) == {
        "backend": "pyav", "codec": "h264", "pixel_format": "yuv420p", "rate_kind": "constant", "fps": 24.0,
        "width": 64, "height": 48, "rotation": 0, "worst_timestamp_error_seconds": pytest.approx(0, abs=1e-9)}

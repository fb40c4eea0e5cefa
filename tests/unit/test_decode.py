"""Decoding: the right frames, the right size, and every kind of bad file told apart."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grn_scale.data import decode
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip, probe, read_clip
from tests.helpers.media import numbered_frames, numbers, write_sound, write_video


def clip_of(path: Path, fps: float = 24, max_frames: int = 201, **more):
    more = more or {"height": 32, "width": 64}
    return decode_clip(DecodeRequest(str(path), fps, max_frames, **more))


def reason_of(path: Path, **more) -> str:
    with pytest.raises(DecodeError) as caught:
        clip_of(path, **more)
    assert str(path) in caught.value.detail
    return caught.value.reason


@pytest.fixture(scope="module")
def steady(tmp_path_factory) -> Path:
    """50 frames, 24 a second, several groups of pictures with B-frames."""
    return write_video(tmp_path_factory.mktemp("media") / "steady.mp4", numbered_frames(50), options={"g": "12"})


def test_frames_follow_the_timestamps(steady):
    clip = clip_of(steady, fps=8)
    assert clip.frames.shape == (17, 32, 64, 3) and clip.frames.dtype == np.uint8
    assert numbers(clip.frames) == list(range(0, 50, 3))
    assert (clip.backend, clip.codec, clip.source_fps) == ("pyav", "h264", 24.0)
    assert clip.worst_timestamp_error_seconds < 1e-6


def test_a_segment_starts_and_ends_where_it_is_told(steady):
    frames = read_clip(steady, begin_frame=13, end_frame=22, fps=24, max_frames=81, height=32, width=64)
    assert numbers(frames) == list(range(13, 22))


def test_length_is_one_plus_whole_groups_and_at_most_max_frames(steady):
    assert len(clip_of(steady, begin_frame=0, end_frame=8, height=32, width=64).frames) == 5
    assert len(clip_of(steady, max_frames=12).frames) == 9


def test_rates_that_do_not_divide_take_the_nearest_frame(steady):
    clip = clip_of(steady, fps=10, max_frames=20)
    assert numbers(clip.frames) == [0, 2, 5, 7, 10, 12, 14, 17, 19, 22, 24, 26, 29, 31, 34, 36, 38]
    assert clip.worst_timestamp_error_seconds == pytest.approx(0.4 / 24, abs=1e-6)


def test_a_faster_rate_than_the_source_repeats_frames(steady):
    assert numbers(clip_of(steady, fps=48, max_frames=5).frames) == [0, 0, 1, 1, 2]


OPEN_GROUPS = {"x264-params": "open-gop=1:keyint=8:min-keyint=1:bframes=3:b-adapt=0:scenecut=0"}
"""Frames shown before a key frame are stored after it and need both sides."""


FAST_HEVC = {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}}
FAST_VP9 = {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}


@pytest.mark.parametrize(("name", "options"), [
    ("one_group.mp4", {"options": {"g": "250"}}),
    ("no_b_frames.mp4", {"options": {"bf": "0", "g": "7"}}),
    ("open_group.mp4", {"options": OPEN_GROUPS}),
    ("open_group.mkv", {"options": OPEN_GROUPS}),
    ("open_group.ts", {"options": OPEN_GROUPS}),
    ("pyramid.mp4", {"options": {"g": "25", "x264-params": "bframes=5:b-pyramid=normal:b-adapt=0"}}),
    ("full_colour.mp4", {"pix_fmt": "yuv444p"}),
    ("bt709.mp4", {"colorspace": 1}),
    ("matroska.mkv", {"options": {"g": "12"}}),
    ("mpeg4.mp4", {"codec": "mpeg4"}),
    ("vp9.webm", FAST_VP9),
    ("hevc.mp4", FAST_HEVC),
    ("transport.ts", {"options": {"g": "12"}}),
    ("old.avi", {"codec": "mpeg4"}),
])
def test_every_range_of_every_kind_of_file_gives_the_right_frames(tmp_path, name, options):
    path = write_video(tmp_path / name, numbered_frames(50), **options)
    for begin, end in ((0, 50), (7, 15), (8, 24), (11, 40), (26, 35)):
        frames = decode_clip(DecodeRequest(str(path), 24, 81, begin, end, 32, 64)).frames
        assert numbers(frames) == list(range(begin, begin + len(frames)))
        assert len(frames) == (end - begin - 1) // 4 * 4 + 1


@pytest.mark.parametrize("options", [{"options": {"g": "12"}}, {"colorspace": 1}, {"pix_fmt": "yuv444p"}])
def test_pixels_are_those_of_another_decoder(tmp_path, options):
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "clip.mp4", numbered_frames(21), **options)
    theirs = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1).get_batch(range(21)).asnumpy()
    np.testing.assert_array_equal(clip_of(path, height=48, width=64).frames, theirs)


def test_variable_rate_goes_by_time(tmp_path):
    times = [*range(0, 500, 20), *range(500, 2001, 100)]  # 50 a second, then 10 a second
    path = write_video(tmp_path / "variable.mp4", numbered_frames(len(times)), fps=50, milliseconds=times)
    info = probe(path)
    assert not info.constant_rate and info.frames == len(times)
    clip = clip_of(path, fps=10)
    assert clip.rate_kind == "variable"
    assert numbers(clip.frames) == [times.index(100 * i) for i in range(21)]


def test_probe_tells_the_facts(steady):
    info = probe(steady)
    assert (info.width, info.height, info.frames, info.codec) == (64, 48, 50, "h264")
    assert info.fps == pytest.approx(24) and info.duration == pytest.approx(50 / 24)
    assert info.rotation == 0 and info.constant_rate


def test_a_bucket_is_chosen_from_the_latent_side(tmp_path):
    path = write_video(tmp_path / "wide.mp4", numbered_frames(9, 36, 64))
    clip = clip_of(path, latent_side=4)
    assert clip.frames.shape == (9, 48, 80, 3) and clip.ratio_key == 0.562
    assert (clip.source_width, clip.source_height) == (64, 36)


def test_odd_sizes_are_cropped_at_the_centre(tmp_path):
    frames = np.full((9, 47, 91, 3), 200, np.uint8)
    frames[:, :, :22], frames[:, :, 69:] = (250, 0, 0), (0, 0, 250)
    path = write_video(tmp_path / "odd.mp4", frames, pix_fmt="yuv444p")
    middle = clip_of(path, height=32, width=32).frames
    assert middle.shape == (9, 32, 32, 3)
    assert abs(middle.astype(int) - 200).max() < 30
    whole = clip_of(path, height=47, width=91).frames
    assert abs(whole.astype(int) - frames).mean() < 4


def test_resizing_smooths_instead_of_skipping_pixels(tmp_path):
    stripes = np.zeros((5, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    path = write_video(tmp_path / "stripes.mp4", stripes, pix_fmt="yuv444p", options={"crf": "4"})
    assert abs(clip_of(path, height=16, width=16).frames.astype(int) - 127).max() < 25


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_files_come_upright(tmp_path, rotation):
    upright = np.full((9, 64, 32, 3), 30, np.uint8)
    upright[:, :16, :16] = 220
    stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90, axes=(1, 2)))
    path = write_video(tmp_path / "rotated.mp4", stored, rotation=rotation)
    info = probe(path)
    assert (info.width, info.height, info.rotation) == (32, 64, rotation)
    clip = clip_of(path, height=64, width=32)
    assert clip.rotation == rotation and abs(clip.frames.astype(int) - upright).mean() < 6


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = write_video(tmp_path / "wide_pixels.mp4", numbered_frames(9, 48, 48), pixel_aspect=Fraction(2))
    assert (probe(path).width, probe(path).height) == (96, 48)
    assert numbers(clip_of(path, height=48, width=96).frames) == list(range(9))


@pytest.mark.parametrize(("name", "options", "part"), [
    ("index_last.mp4", {}, 0.7),
    ("index_first.mp4", {"container_options": {"movflags": "faststart"}}, 0.7),
    ("matroska.mkv", {}, 0.7),
    ("web.webm", FAST_VP9, 0.7),
    ("last_packet.mp4", {"container_options": {"movflags": "faststart"}}, 0.995),
])
def test_a_cut_file_is_truncated_not_shorter(tmp_path, name, options, part):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / name, noise, **options)
    assert len(clip_of(path).frames) == 37
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * part)])
    assert reason_of(path) == "truncated"


def test_damage_inside_a_file_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / "damaged.mp4", noise, options={"g": "20"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle:middle + 2000] = bytes(2000)
    path.write_bytes(data)
    assert reason_of(path) == "corrupt"
    after_the_damage = DecodeRequest(str(path), 24, 81, 20, 40, 32, 64)
    assert len(decode_clip(after_the_damage).frames) == 17


def test_files_that_are_no_video_are_told_apart(tmp_path, steady):
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video\n" * 50)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert reason_of(text) == "unreadable"
    assert reason_of(empty) == "unreadable"
    assert reason_of(tmp_path / "none.mp4") == "missing"
    assert reason_of(tmp_path) == "missing"
    assert reason_of(write_sound(tmp_path / "sound.mp4")) == "no_video_stream"
    assert reason_of(steady, begin_frame=40, end_frame=51, height=32, width=64) == "out_of_range"
    assert reason_of(steady, begin_frame=50, height=32, width=64) == "out_of_range"


def test_a_video_too_short_for_two_latents_is_refused_unless_one_frame_is_asked_for(tmp_path):
    path = write_video(tmp_path / "short.mp4", numbered_frames(4))
    assert reason_of(path) == "too_short"
    single = write_video(tmp_path / "single.mp4", numbered_frames(1))
    assert reason_of(single) == "too_short"
    assert numbers(clip_of(single, max_frames=1).frames) == [0]


def test_a_raw_stream_without_times_is_refused_with_the_remedy(tmp_path):
    path = write_video(tmp_path / "raw.h264", numbered_frames(20))
    with pytest.raises(DecodeError, match="no_timestamps.*-c copy"):
        clip_of(path)


def test_images_are_one_frame(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    clip = clip_of(tmp_path / "a.png", height=40, width=60)
    assert clip.frames.shape == (1, 40, 60, 3) and (clip.backend, clip.codec) == ("pillow", "png")
    np.testing.assert_array_equal(clip.frames[0], pixels)
    assert probe(tmp_path / "a.png").frames == 1

    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown turned by a quarter
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    assert probe(tmp_path / "turned.jpg").width == 40
    assert clip_of(tmp_path / "turned.jpg", latent_side=2).source_width == 40

    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    assert clip_of(tmp_path / "clear.webp", height=32, width=32).frames.min() == 255


def test_bad_images_are_told_apart(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.png").write_text("no image")
    assert reason_of(tmp_path / "cut.jpg") == "truncated"
    assert reason_of(tmp_path / "text.png") == "unreadable"
    assert reason_of(tmp_path / "none.png") == "missing"


def test_a_request_needs_one_way_to_say_the_size():
    for size in ({}, {"height": 32}, {"height": 32, "width": 32, "latent_side": 2}):
        with pytest.raises(ValueError, match="height and width"):
            DecodeRequest("a.mp4", 8, 9, **size)


def test_decoding_does_not_load_torch():
    code = "import sys, grn_scale.data.decode_worker; print('torch' in sys.modules)"
    root = str(Path(decode.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"

"""Damaged inputs never crash the pool or hang it, and no input is ever changed."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest, Media, VideoInfo
from grn_scale.data.decode_pool import DecodePool
from tests.helpers.media import numbered_frames, numbers, write_empty, write_sound, write_video

EXPECTED = {"missing", "unreadable", "no_video_stream", "zero_frames", "no_timestamps", "truncated", "corrupt",
            "out_of_range", "too_short"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, bytes]:
    """Name -> bytes of sound files of many kinds."""
    folder = tmp_path_factory.mktemp("sources")
    frames = numbered_frames(12)
    for name, options in {
        "h264.mp4": {"options": {"g": "5"}}, "fast.mp4": {"container_options": {"movflags": "faststart"}},
        "h264.mkv": {}, "h264.ts": {}, "mpeg4.avi": {"codec": "mpeg4"}, "turned.mp4": {"rotation": 90},
        "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
        "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
        "hevc.mp4": {"codec": "libx265", "pix_fmt": "yuv420p10le",
                     "options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    }.items():
        write_video(folder / name, frames, **options)
    Image.fromarray(frames[5]).save(folder / "picture.png")
    Image.fromarray(frames[5]).save(folder / "picture.jpg")
    Image.fromarray(frames[5]).save(folder / "picture.webp")
    with tarfile.open(folder / "clips.tar", "w") as tar:
        tar.add(folder / "h264.mp4", "first.mp4")
        tar.add(folder / "h264.mkv", "clip.mp4")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutate(data: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """One of several damages, all drawn from `rng`."""
    damaged = bytearray(data)
    kind = int(rng.integers(6))
    place, length = int(rng.integers(len(data))), int(rng.integers(1, 300))
    if kind == 0:  # bits flipped anywhere
        for at in rng.integers(len(data), size=rng.integers(1, 30)):
            damaged[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # bytes of the headers at both ends
        for at in rng.integers(-min(600, len(data)), min(600, len(data)), size=rng.integers(1, 8)):
            damaged[at] = int(rng.integers(256))
    elif kind == 2:
        del damaged[place:]
    elif kind == 3:
        del damaged[place : place + length]
    elif kind == 4:
        damaged[place : place + length] = bytes(rng.integers(256, size=length, dtype=np.uint8))
    else:  # the head of another file
        other = others[int(rng.integers(len(others)))]
        damaged[:length] = other[:length]
    return bytes(damaged)


def mutants(folder: Path, sources: dict[str, bytes], count: int) -> Iterator[DecodeRequest]:
    everything = list(sources.values())
    for number in range(count):
        rng = np.random.default_rng(number)
        name = list(sources)[number % len(sources)]
        path = folder / f"{number:04d}-{name}"
        path.write_bytes(mutate(sources[name], everything, rng))
        yield DecodeRequest(str(path), 24, 9, height=32, width=64, member="clip.mp4" if name.endswith(".tar") else None)


@pytest.mark.parametrize("count", [260, pytest.param(5200, marks=pytest.mark.slow)])
def test_mutated_files_give_a_clip_or_a_reason(sources, tmp_path, count):
    good = tmp_path / "good.mp4"
    good.write_bytes(sources["h264.mp4"])
    outcomes: Counter[str] = Counter()
    with DecodePool(2, timeout_seconds=20, memory_megabytes=1024) as pool:
        for request, result in pool.map(mutants(tmp_path, sources, count)):
            if isinstance(result, DecodedClip):
                outcomes["clip"] += 1
                assert result.frames.dtype == np.uint8 and result.frames.shape[1:] == (32, 64, 3)
                assert len(result.frames) in ((1,) if result.rate_kind == "still" else (5, 9))
            else:
                outcomes[result.reason] += 1
                assert request.path in result.detail
        for file, found in pool.probe(sorted(tmp_path.iterdir())):
            assert isinstance(found, VideoInfo | DecodeError), file
        (_, sound), = pool.map([DecodeRequest(str(good), 24, 9, height=32, width=64)])
    assert numbers(sound.frames) == list(range(9))
    assert sum(outcomes.values()) == count and len(outcomes) > 4
    # Damage may ask for any amount of memory; nothing else may end a child, and nothing may hang.
    assert set(outcomes) <= EXPECTED | {"clip", "out_of_memory"}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder that a write would change."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else sorted(os.listdir(path))
        found[str(path)] = (content, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode,
                            status.st_ino, status.st_nlink)
    return found


def test_no_input_is_changed_and_nothing_is_put_beside_it(sources, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    for name, data in sources.items():
        (folder / name).write_bytes(data)
        (folder / f"cut-{name}").write_bytes(data[: len(data) * 2 // 3])
    write_sound(folder / "sound.mp4")
    write_empty(folder / "empty.mp4")
    (folder / "text.mp4").write_text("no video")
    files = [Media(str(path), "clip.mp4" if path.suffix == ".tar" else None) for path in sorted(folder.iterdir())]
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    before = snapshot(folder)
    with DecodePool(1, timeout_seconds=60) as pool:
        clips = [clip for _, clip in pool.map(DecodeRequest(media.path, 24, 9, latent_side=4, member=media.member)
                                              for media in files)]
        list(pool.probe(files))
    assert sum(isinstance(clip, DecodedClip) for clip in clips) >= len(sources)
    assert sum(isinstance(clip, DecodeError) for clip in clips) >= 10
    assert snapshot(folder) == before

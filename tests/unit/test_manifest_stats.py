"""What stats counts, and what it expects tokenize to make of a manifest."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from grn_scale.command_line import run
from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodeError, DecodeRequest, decode_clip
from grn_scale.data.manifest import load_manifest
from grn_scale.data_pipeline import manifest as command
from grn_scale.data_pipeline.manifest_plan import place, told_facts
from grn_scale.data_pipeline.manifest_spread import Spread

SETTINGS = ("tokenize.latent_side=4", "tokenize.fps=8", "tokenize.max_frames=17", "data.token_budget=128")


def write(folder: Path, *lines: dict) -> Path:
    path = folder / "clips.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def video(path: Path, frames: int, fps: int, size: tuple[int, int] = (64, 64)) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((*size, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())


def stats(capsys, path: Path, *options: str, code: int = 0) -> dict:
    assert run(command.main, ["stats", str(path), "--json", *SETTINGS, *options]) == code
    return json.loads(capsys.readouterr().out)


def test_fields_alone_give_lengths_sizes_and_captions(tmp_path, capsys):
    path = write(tmp_path, {"path": "a.mp4", "caption": "one two", "begin_frame": 8, "end_frame": 24, "fps": 8,
                            "width": 848, "height": 480},
                 {"path": "a.mp4", "id": "2", "caption": [{"type": "long", "content": "one two three four"}]},
                 {"path": "b.png", "class_id": 2, "flip": True, "width": 10, "height": 20}, {"path": "c.mp4"})
    values = stats(capsys, path)
    assert (values["clips"], values["images"], values["flipped"], values["with_class_id"]) == (4, 1, 1, 1)
    assert (values["unknown_size"], values["unknown_length"], values["dropped"]) == (1, 1, {"no_caption": 1})
    assert values["seconds"] == {"count": 1, "sum": 2.0, "min": 2.0, "p5": 2.0, "median": 2.0, "p95": 2.0, "max": 2.0}
    assert values["sizes"] == {"848x480": 1, "10x20": 1}
    assert values["captions"] == {"untyped": 1, "long": 1} and values["caption_words"]["max"] == 4
    assert stats(capsys, path, "tokenize.allow_empty_captions=true")["without_caption"] == 1


def test_buckets_say_what_is_cropped_enlarged_cut_and_dropped(tmp_path, capsys):
    clip = {"path": "a.mp4", "caption": "x", "width": 128, "height": 128, "fps": 8}
    path = write(tmp_path, {**clip, "id": "1", "duration": 2.125}, {**clip, "id": "2", "duration": 5, "width": 32,
                                                                    "height": 32},
                 {**clip, "id": "3", "duration": 0.25}, {**clip, "id": "4", "duration": 1, "width": 130})
    square, = stats(capsys, path)["buckets"]
    assert (square["height"], square["width"], square["clips"]) == (64, 64, 4)
    crop = 1 - 128 / 130
    assert (square["crop_max"], square["crop_mean"]) == pytest.approx((crop, crop / 4), abs=1e-4)
    assert square["enlarged"] == 1 and square["enlarged_by"]["max"] == 2.0
    assert square["tokens"]["max"] == 5 * 16 and square["tokens"]["sum"] == (5 + 5 + 2) * 16
    assert (square["cut"], square["cut_seconds"], square["too_short"]) == (1, 2.9, 1)
    values = stats(capsys, path, "tokenize.max_frames=33")
    assert values["buckets"][0]["over_budget"] == 1 and values["usable"] == 2 and values["dropped"] == {"too_short": 1}


@pytest.mark.parametrize("rate", [8, 10, 25])
@pytest.mark.parametrize("end", [4, 5, 30, None])
def test_the_plan_is_what_decoding_gives(tmp_path, rate, end):
    video(tmp_path / "a.mp4", 40, rate, (48, 80))
    clip, = load_manifest(write(tmp_path, {"path": "a.mp4", "caption": "x", "begin_frame": 2, "end_frame": end or 40,
                                           "fps": rate, "width": 80, "height": 48}))
    settings = TokenizeConfig(fps=8, max_frames=17, latent_side=4)
    placement = place(told_facts(clip, settings.fps), settings)
    request = DecodeRequest(str(clip.path), 8, 17, 2, end, latent_side=4)
    try:
        frames = decode_clip(request).frames
    except DecodeError as error:
        assert error.reason == "too_short" and placement.too_short
    else:
        bucket = placement.bucket
        assert frames.shape[1:3] == (bucket.height, bucket.width)
        assert placement.tokens == ((len(frames) - 1) // 4 + 1) * bucket.grid[0] * bucket.grid[1]
        assert not placement.too_short


def test_probing_reads_the_files_and_drops_what_decoding_would(tmp_path, capsys):
    video(tmp_path / "a.mp4", 20, 8)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    path = write(tmp_path, {"path": "a.mp4", "caption": "x"}, {"path": "a.mp4", "caption": "x", "end_frame": 9},
                 {"path": "a.mp4", "caption": "x", "begin_frame": 30}, {"path": "bad.mp4", "caption": "x"},
                 {"path": "none.mp4", "caption": "x"})
    values = stats(capsys, path, "--probe", "--plot", str(tmp_path / "clips.png"))
    assert values["dropped"] == {"out_of_range": 1, "unreadable": 1, "missing": 1}
    assert values["usable"] == 2 and values["seconds"]["sum"] == round(20 / 8 + 9 / 8, 3)
    assert values["buckets"][0]["tokens"]["sum"] == (5 + 3) * 16
    assert (tmp_path / "clips.png").read_bytes().startswith(b"\x89PNG")


def test_tables_and_an_empty_picture_are_shown_too(tmp_path, capsys):
    path = write(tmp_path, {"path": "a.mp4", "caption": "x"})
    assert run(command.main, ["stats", str(path), "--plot", str(tmp_path / "clips.png")]) == 0
    out = capsys.readouterr().out
    assert "no size is known; --probe" in out and "not given" in out
    path = write(tmp_path, {"path": "a.mp4", "caption": "x", "width": 848, "height": 480, "duration": 3})
    assert run(command.main, ["stats", f"data.manifest={path}", "data.token_budget=131072"]) == 0
    assert "480 x 848" in capsys.readouterr().out


def test_a_plan_without_a_usable_clip_is_an_error_that_says_what_to_change(tmp_path, capsys):
    clip = {"path": "a.mp4", "caption": "x", "width": 128, "height": 128}
    for line in ({**clip, "duration": 0.1}, {"path": "a.mp4"}):
        assert run(command.main, ["stats", str(write(tmp_path, line)), *SETTINGS]) == 1
        assert "none of its 1 lines gives a clip" in capsys.readouterr().err
    assert run(command.main, ["stats", str(write(tmp_path, {**clip, "duration": 9})), *SETTINGS,
                              "tokenize.max_frames=49"]) == 1
    assert "data.token_budget" in capsys.readouterr().err
    assert run(command.main, ["stats"]) == 2
    assert run(command.main, ["stats", "x.jsonl", "--plot", str(tmp_path / "no" / "x.png")]) == 2


def test_a_spread_keeps_no_values_but_their_ends_and_sum():
    spread = Spread()
    for value in range(1, 100_001):
        spread.add(value / 7)
    summary = spread.summary()
    assert summary["count"] == 100_000 and summary["max"] == round(100_000 / 7, 3)
    assert summary["median"] == pytest.approx(50_000 / 7, rel=0.005) and len(spread.counts) < 5000
    assert Spread().summary() is None

"""Sampled labels to frames, MP4 files and labelled pictures."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import load_file

from grn_scale import hbq
from grn_scale.config.schema import ModelConfig
from grn_scale.model import build_model
from grn_scale.sampling import Condition, SamplingSettings, generate, video
from grn_scale.sampling.film import Film
from grn_scale.sampling.pictures import contact_sheet, film_strip, png_bytes, wrap
from grn_scale.sampling.video import decode_clips, encode_first_frame, encode_mp4, spread, to_features
from grn_scale.tokenizer.clips import to_frames
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape
from tests.unit.test_model_golden import GOLDEN, golden_config

CASES = json.loads((GOLDEN / "grn_sampler_cases.json").read_text())
CONFIG = ModelConfig(latent_channels=4, rounds=3)


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    torch.manual_seed(0)
    return VideoTokenizer(VideoTokenizerShape(4, 4, 4)).eval().requires_grad_(False)


def labels(*thw: int, seed: int = 0, config: ModelConfig = CONFIG) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.classes, (config.label_channels, *thw), generator=generator).to(torch.uint8)


def moving_square(frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    clip = np.full((frames, height, width, 3), 40, dtype=np.uint8)
    for i in range(frames):
        clip[i, 8:24, 3 * i:3 * i + 16] = (220, 60, 30)
    return clip


# --- frames

@pytest.mark.parametrize("trace", CASES)
def test_frames_of_recorded_labels_equal_the_reference(trace):
    record = load_file(GOLDEN / "grn_sampler_trace.safetensors")
    weights = load_file(GOLDEN / "hbq_tokenizer.safetensors")
    tokenizer = VideoTokenizer(VideoTokenizerShape(8, 4, 8)).eval().requires_grad_(False)
    tokenizer.load_state_dict({k.removeprefix("state/"): v for k, v in weights.items() if k.startswith("state/")})
    config = golden_config(CASES[trace]["model"], trace[:2])
    last = record[f"{trace}/sampled_labels"][-1][0]
    if f"{trace}/first_frame_labels" in record:
        last = torch.cat((record[f"{trace}/first_frame_labels"][0], last), dim=1)
    assert torch.equal(to_features(last[None], config), record[f"{trace}/final_latent"])
    frames = next(decode_clips(tokenizer, [last], config))
    reference = record[f"{trace}/image_u8_bgr"][0].numpy()[..., ::-1]
    assert frames.shape == reference.shape and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - reference.astype(int)).max() <= 1


def test_pixel_values_are_clamped_and_truncated():
    values = torch.tensor([-2.0, -1.0, -0.001, 0.0, 1.0, 3.0]).view(1, 1, 1, 1, 6).expand(1, 3, 1, 1, 6)
    assert to_frames(values)[0, 0, 0, :, 0].tolist() == [0, 0, 127, 127, 255, 255]


def test_clips_come_back_in_order_whatever_their_shapes(tokenizer):
    clips = [labels(2, 1, 2, seed=0), labels(2, 1, 2, seed=1), labels(1, 2, 1, seed=2), labels(2, 1, 2, seed=3)]
    frames = list(decode_clips(tokenizer, clips, CONFIG))
    assert [f.shape for f in frames] == [(5, 16, 32, 3), (5, 16, 32, 3), (1, 32, 16, 3), (5, 16, 32, 3)]
    for clip, decoded in zip(clips, frames):
        expected = to_frames(tokenizer.decode(to_features(clip[None], CONFIG)))[0]
        assert np.abs(decoded.astype(int) - expected.astype(int)).max() <= 1


def test_a_long_clip_is_decoded_in_pieces_to_the_same_frames(tokenizer, monkeypatch):
    clip = labels(4, 2, 2)
    whole = next(decode_clips(tokenizer, [clip], CONFIG))
    monkeypatch.setattr(video, "BATCH_CELLS", 4)
    pieces = next(decode_clips(tokenizer, [clip], CONFIG))
    assert whole.shape == (13, 32, 32, 3) and np.abs(whole.astype(int) - pieces.astype(int)).max() <= 1


@pytest.mark.parametrize("form", ["bit", "index"])
def test_labels_of_a_first_frame_are_those_of_the_clip_it_begins(tokenizer, form):
    config = ModelConfig(latent_channels=4, rounds=3, label_form=form)
    clip = moving_square()
    first = encode_first_frame(tokenizer, clip[0], config)
    features = tokenizer.encode(torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)
    quantise = hbq.quantize_bits if form == "bit" else hbq.quantize_index
    expected = quantise(features, 3)[0, :, :1]
    assert first.shape == expected.shape == (config.label_channels, 1, 2, 3)
    assert (first == expected).float().mean() > 0.99


# --- files

def test_an_mp4_repeats_byte_for_byte_and_shows_the_frames():
    clip = moving_square()
    data = encode_mp4(clip, 8.0)
    assert data == encode_mp4(clip, 8.0)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.average_rate == 8 and stream.pix_fmt == "yuv420p"
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == clip.shape
    assert np.abs(decoded.astype(int) - clip.astype(int)).mean() < 6


def test_numbers_are_spread_from_the_first_to_the_last():
    assert list(spread(3, 5)) == [0, 1, 2]
    assert list(spread(50, 7)) == [0, 8, 16, 24, 33, 41, 49]


# --- pictures

def test_a_film_strip_has_a_row_for_each_map_and_a_column_for_each_frame():
    rows = [("step 1\n10 % predicted", moving_square()), ("result", moving_square())]
    picture = film_strip(rows, "a red square moves right", columns=3, cell_pixels=32)
    pixels = np.asarray(picture)
    red = (np.abs(pixels.astype(int) - (220, 60, 30)).sum(axis=2) == 0)
    assert red.sum() == 2 * 3 * 16 * 16
    assert png_bytes(picture) == png_bytes(film_strip(rows, "a red square moves right", columns=3, cell_pixels=32))
    assert Image.open(io.BytesIO(png_bytes(picture))).size == picture.size


@pytest.mark.parametrize("height,shown", [(32, 96), (80, 80), (480, 80)])
def test_a_contact_sheet_scales_frames_to_a_readable_size(height, shown):
    clip = np.zeros((5, height, height, 3), np.uint8)
    sheet = np.asarray(contact_sheet([clip] * 3, ["one", "two words", ""], columns=2, title="black"))
    assert (sheet == 0).all(axis=2).sum() >= 3 * 3 * shown**2
    assert sheet.shape[1] == 12 + 2 * (3 * (shown + 4) - 4 + 12)


def test_a_contact_sheet_takes_single_frames_and_other_shapes():
    clips = [np.zeros((1, 16, 16, 3), np.uint8), np.zeros((9, 32, 64, 3), np.uint8)]
    assert contact_sheet(clips, ["picture", "clip"]).mode == "RGB"
    with pytest.raises(ValueError):
        contact_sheet(clips, ["only one caption"])


def test_captions_are_wrapped_between_words():
    font = ImageFont.load_default(14)
    lines = wrap("a small red circle moving left on a black background", 120, font)
    assert len(lines) > 1 and " ".join(lines) == "a small red circle moving left on a black background"
    assert all(font.getlength(line) <= 120 for line in lines)
    assert wrap("", 50, font) == [""] and wrap("unbreakablyverylong word", 10, font) == ["unbreakablyverylong", "word"]


def test_a_film_shows_the_way_from_noise_to_the_result(tokenizer):
    config = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_hidden_size=32, num_chunks=1,
                         text_hidden_size=4, latent_channels=4, rounds=3)
    asked = [Condition(torch.randn(2, 4), torch.randn(1, 4), (2, 1, 2), 1.0) for _ in range(2)]
    film = Film(1, steps=9, rows=4)
    result = generate(build_model(config), asked, SamplingSettings(9, 9, 1.5), record=True, observe=film)
    names = [name.replace("\n", " ") for name, _ in film.rows]
    shares = result.trace["next_pt_realised"][:, 1]
    assert names == [*(f"step {i + 1} {100 * shares[i]:.0f} % predicted" for i in (0, 3, 5)), "result step 9"]
    assert torch.equal(film.rows[1][1], result.trace["mixed_labels_out"][3, 1])
    assert torch.equal(film.rows[-1][1], result.labels[1])
    strip = film.strip(tokenizer, config, "noise to video")
    assert strip.height > 4 * 96

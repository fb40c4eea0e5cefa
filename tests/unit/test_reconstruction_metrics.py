"""PSNR and SSIM of clips that went through the video tokenizer, by rounds of HBQ kept."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch

from grn_scale.errors import UserError
from grn_scale.evaluation import quality
from grn_scale.evaluation.quality import compare, frame_ssim, quality_by_round, reconstruct
from grn_scale.hbq import dequantize_index, quantize_index
from grn_scale.tokenizer.clips import encode_features, encode_frames, psnr, to_frames
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape

ROUNDS = 3


@pytest.fixture(scope="module")
def tokenizer() -> VideoTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VideoTokenizer(VideoTokenizerShape(4, 4, 4, (1, 1, 2, 2), residual_blocks=1)).eval().requires_grad_(
            False)


def noise(frames: int, seed: int = 0, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), dtype=np.uint8)


def test_each_entry_is_the_clip_decoded_from_the_first_rounds_alone(tokenizer):
    frames = noise(9)
    features = encode_features(tokenizer, frames[None])
    found = quality_by_round(tokenizer, frames, ROUNDS)
    for kept, values in enumerate(found, start=1):
        # m rounds of a longer quantisation are the quantisation of m rounds
        again = to_frames(tokenizer.decode(dequantize_index(quantize_index(features, kept), kept)))[0]
        assert values.psnr_db == pytest.approx(psnr(again, frames), abs=1e-9)
        assert values.ssim == pytest.approx(frame_ssim(again, frames).mean(), abs=1e-12)
    assert np.array_equal(reconstruct(tokenizer, frames, ROUNDS), again)


def test_long_clips_go_through_in_pieces_with_the_same_bits_and_pixels(tokenizer, monkeypatch):
    frames = noise(41, side=16)
    lengths = []
    encode, decode = tokenizer._encode, tokenizer._decode
    monkeypatch.setattr(tokenizer, "_encode", lambda x, history: lengths.append(x.shape[2]) or encode(x, history))
    monkeypatch.setattr(tokenizer, "_decode", lambda x, history: lengths.append(x.shape[2]) or decode(x, history))
    monkeypatch.setattr(quality, "BATCH_CELLS", 4)
    streamed = reconstruct(tokenizer, frames, ROUNDS)
    assert lengths == [33, 8, *[1] * 11], "pieces, not the clip, go through at once"
    bits = encode_frames(tokenizer, frames[None], ROUNDS)[0]
    assert bits.shape[0] == 11
    labels = quantize_index(encode_features(tokenizer, frames[None]), ROUNDS)
    whole = to_frames(tokenizer.decode(dequantize_index(labels, ROUNDS)))[0]
    assert np.abs(streamed.astype(int) - whole).max() <= 1


def test_psnr_of_pieces_is_that_of_the_clip_and_infinite_for_equal_ones():
    truth, found = noise(9, 1), noise(9, 2)
    values = compare(iter([found[:1], found[1:6], found[6:]]), truth, ssim=False)
    assert values.psnr_db == pytest.approx(psnr(found, truth), abs=1e-12) and values.ssim is None
    assert compare(iter([truth]), truth, ssim=False).psnr_db == math.inf
    with pytest.raises(ValueError, match="5 frames are compared with 9"):
        compare(iter([found[:5]]), truth, ssim=False)


def test_ssim_is_one_for_equal_frames_falls_with_noise_and_follows_the_formula_on_flat_ones():
    smooth = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None] * 6, (10, 32, 32, 3)).copy()
    values = [frame_ssim(np.clip(smooth + np.random.default_rng(0).normal(0, s, smooth.shape), 0, 255).astype(np.uint8),
                         smooth).mean().item() for s in (0, 4, 16, 64)]
    assert values[0] == pytest.approx(1) and values == sorted(values, reverse=True)
    black, grey = np.full((1, 16, 16, 3), 0, np.uint8), np.full((1, 16, 16, 3), 51, np.uint8)
    # without variance only the luminance term is left: (2 m1 m2 + c1) / (m1^2 + m2^2 + c1)
    assert frame_ssim(black, grey).item() == pytest.approx(1e-4 / (0.2**2 + 1e-4), rel=1e-4)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(UserError, match=r'pip install "grn-scale\[evaluate\]"'):
        quality.load_ssim()

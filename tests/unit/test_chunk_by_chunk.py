"""The run that the tokenizer's speed is compared with must compute the same thing."""

import pytest
import torch

from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.chunk_by_chunk import ChunkByChunk
from grn_scale.tokenizer.layers import use_channels_last
from grn_scale.tokenizer.video import VideoTokenizer, VideoTokenizerShape


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_chunk_by_chunk_gives_what_the_tokenizer_gives(frames):
    torch.manual_seed(0)
    tokenizer = use_channels_last(VideoTokenizer(VideoTokenizerShape(8, 12, 6)))
    chunked = ChunkByChunk(tokenizer)
    video = torch.rand(2, 3, frames, 32, 48) * 2 - 1
    with torch.inference_mode():
        features = tokenizer.encode(video)
        torch.testing.assert_close(chunked.encode(video), features, rtol=0, atol=1e-5)
        decoded = tokenizer.decode(features)
        torch.testing.assert_close(chunked.decode(features), decoded, rtol=0, atol=1e-4 * float(decoded.std()))


def test_chunk_by_chunk_leaves_the_tokenizer_as_it_was():
    tokenizer = load_tokenizer("small")
    weight = tokenizer.decoder.upsamples[0].upsamples[0].residual[2].weight
    before = weight.stride(), weight.clone()
    ChunkByChunk(tokenizer)
    assert weight.stride() == before[0] and torch.equal(weight, before[1])

"""The text encoder of training on a GPU: its slices give what the whole encoder gives there."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from grn_scale.tokenizer.sharded_text import ShardedTextEncoder
from grn_scale.tokenizer.text import load_text_encoder
from tests.helpers.clips import caption, write_text_encoder

pytestmark = pytest.mark.gpu


def test_the_shared_encoder_equals_the_whole_one(tmp_path) -> None:
    device = torch.device(os.environ.get("GRN_TEST_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    folder = write_text_encoder(tmp_path / "text", 12)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, shared = load_text_encoder(folder, 64, device), ShardedTextEncoder(folder, dist.group.WORLD, device)
        ids = [whole.token_ids(text) for text in ("", *map(caption, range(12)))]
        for _ in range(2):
            found = shared.encode_ids(ids)
            assert all(states.device.type == device.type for states in found)
            assert all(torch.equal(a, b) for a, b in zip(found, whole.encode_ids(ids), strict=True))
    finally:
        dist.destroy_process_group()

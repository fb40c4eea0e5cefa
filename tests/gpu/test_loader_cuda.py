"""Packs as they are read where there is a GPU: python -m pytest -m gpu"""

from __future__ import annotations

import os

import pytest
import torch

from grn_scale.data.dataset import Dataset
from grn_scale.data.loader import read_pack
from grn_scale.data.plan import Plan
from tests.helpers.token_dataset import bits_of, write_tokens

pytestmark = pytest.mark.gpu


def test_bits_of_a_pack_lie_in_pinned_memory(tmp_path) -> None:
    on_gpu = os.environ.get("GRN_TEST_DEVICE", "cuda") == "cuda"
    if on_gpu and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    write_tokens(tmp_path, range(1))
    dataset = Dataset.open(tmp_path)
    plan = Plan(dataset, seed=0, token_budget=128)
    packs, _ = plan.next_step(plan.start(), plan.packs_in_epoch(0) + 1)
    for sample in [sample for pack in packs for sample in read_pack(dataset, pack)]:
        assert (sample.bits == bits_of(int(sample.draw.key[4:]), sample.draw.thw)).all()
        assert torch.from_numpy(sample.bits).is_pinned() == on_gpu

"""Copies of a state on the device, in page-locked host memory."""

import pytest
import torch

from grn_scale.checkpoint import load_weights
from grn_scale.checkpoint.background import BackgroundSaver
from grn_scale.checkpoint.chunks import whole
from grn_scale.checkpoint.staging import HostStaging, staging_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]


def test_device_tensors_arrive_in_page_locked_memory_that_is_kept(tmp_path):
    values = {"w": torch.randn(1000, 1000), "half": torch.randn(33, 7).bfloat16(), "scale": torch.tensor(2.0)}
    sections = {"model": [whole(name, value.cuda()) for name, value in values.items()]}
    sections["model"].append(whole("turned", values["w"].cuda().T))
    staging = HostStaging()
    staging.reserve(staging_bytes(sections))
    copies = staging.copy(sections)["model"]
    assert all(chunk.tensor.is_pinned() for chunk in copies)
    assert torch.equal(copies[0].tensor, values["w"]) and torch.equal(copies[3].tensor, values["w"].T)
    place = copies[0].tensor.data_ptr()
    assert staging.copy(sections)["model"][0].tensor.data_ptr() == place
    staging.release()
    with BackgroundSaver(tmp_path, keep_last=1) as saver:
        saver.save(1, sections, {})
        for chunk in sections["model"]:
            chunk.tensor.zero_()
    assert all(torch.equal(load_weights(tmp_path)[name], value) for name, value in values.items())

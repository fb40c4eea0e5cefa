"""Boxes read out of files: right for every cut and block size, and without holding more than the box and a block."""

import itertools
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from grn_scale.checkpoint import box_reader
from grn_scale.checkpoint.box_reader import BoxReader
from grn_scale.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from grn_scale.checkpoint.chunks import Chunk, narrow, whole
from grn_scale.errors import UserError
from tests.helpers.checkpoints import in_child


def boxes(shape):
    """Some boxes of a tensor: both ends, the middle and single elements along each dimension."""
    ranges = [sorted({(0, n), (0, min(1, n)), (n // 2, n - n // 2), (min(1, n), max(0, n - 2))}) for n in shape]
    for cut in itertools.product(*ranges):
        yield tuple(start for start, _ in cut), tuple(length for _, length in cut)


@pytest.mark.parametrize("block", [1, 40, 100, 1 << 24])
def test_every_box_comes_back_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(box_reader, "BLOCK_BYTES", block)
    tensors = {"deep": torch.arange(3 * 4 * 5 * 2.0).reshape(3, 4, 5, 2),
               "wide": torch.arange(7 * 9.0).reshape(7, 9).bfloat16(), "row": torch.arange(11), "one": torch.tensor(3.),
               "flags": torch.tensor([[True, False, True]]), "none": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "t.safetensors")
    with BoxReader(tmp_path / "t.safetensors") as file:
        for name, tensor in tensors.items():
            for offset, size in boxes(tensor.shape):
                wanted = narrow(tensor, offset, size)
                compact = torch.empty(size, dtype=tensor.dtype)
                inside = narrow(torch.empty([2 * n for n in size], dtype=tensor.dtype), [n // 2 for n in size], size)
                for target in (compact, inside):
                    target.zero_()
                    file.read(name, offset, target)
                    assert torch.equal(target, wanted), (name, offset, size)


def test_what_does_not_fit_the_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(4, 4)}, tmp_path / "t.safetensors")
    with BoxReader(tmp_path / "t.safetensors") as file:
        for key, offset, target in (("v", (0, 0), torch.zeros(1, 1)), ("w", (0, 0), torch.zeros(1, 1).bfloat16()),
                                    ("w", (3, 0), torch.zeros(2, 4)), ("w", (0,), torch.zeros(2))):
            with pytest.raises(UserError, match="not what the index says"):
                file.read(key, offset, target)
        os.truncate(tmp_path / "t.safetensors", (tmp_path / "t.safetensors").stat().st_size - 4)
        with pytest.raises(UserError, match="ends inside"):
            file.read("w", (0, 0), torch.zeros(4, 4))
    with pytest.raises(UserError, match="truncated"):
        BoxReader(tmp_path / "t.safetensors")


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_that_loads_its_eighth_never_holds_the_whole(tmp_path, axis):
    rows, columns, names = 2048, 1024, [f"w{i}" for i in range(16)]  # 128 MiB
    values = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    path = save_checkpoint(tmp_path, 1, {"model": [whole(name, values) for name in names]}, {}, keep_last=1)
    size = (rows // 8, columns) if axis == 0 else (rows, columns // 8)
    offset = tuple(3 * length if d == axis else 0 for d, length in enumerate(size))

    def load():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        chunks = [Chunk(name, (rows, columns), offset, torch.empty(size)) for name in names]
        load_checkpoint(path, {"model": chunks})
        assert all(torch.equal(chunk.tensor, narrow(values, offset, size)) for chunk in chunks)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert grown < 16 + 2 * 16 + 8, f"{grown} MiB for a part of 16 MiB and a block of 16 MiB"

    assert in_child(load) == 0

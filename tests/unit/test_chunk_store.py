"""Chunk folders in one process: any boxes to any boxes, and every refusal."""

import json

import pytest
import torch
from safetensors.torch import load_file

from grn_scale.checkpoint.chunks import Chunk, fragment_boxes, whole
from grn_scale.checkpoint.index import ChunkIndex
from grn_scale.checkpoint.store import load_chunks, save_chunks
from grn_scale.errors import UserError
from tests.helpers.checkpoints import chunks, same, weights


def test_tensors_of_every_dtype_and_shape_come_back_bit_for_bit(tmp_path):
    tensors = weights() | {"nan": torch.tensor([float("nan"), float("inf"), -0.0]),
                           "flags": torch.tensor([True, False]),
                           "count": torch.tensor(2**40), "nothing": torch.empty(0, 3),
                           "strided": torch.arange(12.0).reshape(3, 4).t(), "half": torch.ones(3).half(),
                           "parameter": torch.nn.Parameter(torch.ones(2))}
    save_chunks(tmp_path / "c", chunks(tensors))
    back = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    load_chunks(tmp_path / "c", chunks(back))
    for name, tensor in tensors.items():
        assert back[name].contiguous().flatten().view(torch.uint8).equal(
            tensor.detach().contiguous().flatten().view(torch.uint8)), name


def test_one_process_writes_a_file_that_the_safetensors_library_reads_by_official_name(tmp_path):
    save_chunks(tmp_path, chunks(weights()))
    assert same(load_file(tmp_path / "rank-00000.safetensors"), weights())


def test_any_boxes_load_from_any_boxes(tmp_path):
    tensor = torch.randn(5, 4, 3)
    flat = tensor.reshape(-1)
    saved = []
    for start, end in ((0, 17), (17, 40), (40, 60)):
        saved += [Chunk("w", (5, 4, 3), offset, flat[start:end][at:][:torch.Size(size).numel()].view(size))
                  for offset, size, at in fragment_boxes((5, 4, 3), start, end - start)]
    save_chunks(tmp_path, saved)
    for offset, size in (((0, 0, 0), (5, 4, 3)), ((1, 1, 1), (3, 2, 2)), ((4, 3, 2), (1, 1, 1)),
                         ((2, 0, 0), (0, 4, 3))):
        target = torch.zeros(size[::-1]).permute(2, 1, 0).requires_grad_()  # strided and a leaf: filled in place
        load_chunks(tmp_path, [Chunk("w", (5, 4, 3), offset, target)])
        assert torch.equal(target, tensor[tuple(slice(o, o + n) for o, n in zip(offset, size))])


def test_a_repeated_chunk_is_written_once(tmp_path):
    index = save_chunks(tmp_path, chunks(weights()) + chunks(weights()))
    assert same(load_file(tmp_path / "rank-00000.safetensors"), weights())
    assert index.parameters == 30 + 6 + 24 + 1


def test_a_hole_is_refused_and_nothing_readable_remains(tmp_path):
    with pytest.raises(UserError, match=r"tensor w .*at \(2, 0\) of size \(1, 4\)"):
        save_chunks(tmp_path / "c", [Chunk("w", (3, 4), (0, 0), torch.zeros(2, 4))])
    assert not (tmp_path / "c").exists()


def test_ranks_that_disagree_overlap_or_a_foreign_dtype_are_refused(tmp_path):
    with pytest.raises(UserError, match="w: rank 0 says torch.bfloat16"):
        save_chunks(tmp_path, [whole("w", torch.zeros(2)), whole("w", torch.zeros(2).bfloat16())])
    with pytest.raises(UserError, match="tensor w .*overlap"):
        save_chunks(tmp_path, [whole("w", torch.zeros(3)), Chunk("w", (3,), (1,), torch.zeros(1))])
    with pytest.raises(UserError, match="w has dtype torch.complex64"):
        save_chunks(tmp_path, [whole("w", torch.zeros(2, dtype=torch.complex64))])
    save_chunks(tmp_path, [whole("w", torch.zeros(2))])
    with pytest.raises(UserError, match="holds chunks already"):
        save_chunks(tmp_path, [whole("w", torch.ones(2))])


def test_missing_and_left_over_tensors_are_listed(tmp_path):
    save_chunks(tmp_path, chunks(weights()))
    wanted = {"blocks.0.bias": torch.zeros(6).bfloat16(), "blocks.9.bias": torch.full((6,), 3.0)}
    with pytest.raises(UserError, match="(?s)blocks.9.bias is missing.*scale is in the checkpoint"):
        load_chunks(tmp_path, chunks(wanted))


def test_another_shape_or_dtype_is_an_error(tmp_path):
    save_chunks(tmp_path, chunks(weights()))
    wrong = weights() | {"scale": torch.zeros(1), "blocks.0.bias": torch.zeros(6)}
    with pytest.raises(UserError, match=r"(?s)blocks.0.bias is float32 here and bfloat16.*scale has shape \(1,\)"):
        load_chunks(tmp_path, chunks(wrong))


def test_an_index_that_names_a_file_elsewhere_or_is_malformed_is_refused(tmp_path):
    save_chunks(tmp_path, chunks(weights()))
    good = json.loads((tmp_path / "metadata.json").read_text())
    escaping = json.loads(json.dumps(good).replace("rank-00000.safetensors", "../rank-00000.safetensors"))
    uncovered = json.loads(json.dumps(good))
    uncovered["tensors"]["scale"]["chunks"] = []
    for content, message in ((escaping, "not one of this folder's"), (uncovered, "does not cover scale"),
                             (good | {"format_version": 99}, "format version 99"), (good | {"tensors": 3}, "form"),
                             ([], "JSON object")):
        (tmp_path / "metadata.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_chunks(tmp_path, chunks(weights()))
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*metadata.json"):
        load_chunks(tmp_path, chunks(weights()))


def test_an_index_is_written_and_read_back_equal(tmp_path):
    index = save_chunks(tmp_path, chunks(weights()))
    assert ChunkIndex.read(tmp_path) == index

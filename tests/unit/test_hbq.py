"""HBQ against the recorded reference, on the inputs where rounding could go wrong, and its byte form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grn_scale import hbq
from grn_scale.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ROUNDS = range(1, 9)


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "hbq_quant.safetensors")


@pytest.fixture(params=[False, True], ids=["denormals kept", "denormals flushed"])
def flush(request):
    torch.set_flush_denormal(request.param)
    yield request.param
    torch.set_flush_denormal(False)


def recursion(features, rounds):
    """The definition, bit by bit, in exact rational arithmetic on the host."""
    from fractions import Fraction

    bits = []
    for value in features.tolist():
        q, row = Fraction(0), []
        for m in range(1, rounds + 1):
            b = int(Fraction(value) > q)
            q += (2 * b - 1) * Fraction(1, 2**m)
            row.append(b)
        bits.append(row)
    return torch.tensor(bits, dtype=torch.uint8)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_labels_and_values_equal_the_recorded_reference(golden, rounds, flush):
    features = golden["features"]
    bits, index, values = (golden[f"M{rounds}/{name}"] for name in ("bits", "index", "dequant"))
    assert torch.equal(hbq.quantize_bits(features, rounds), bits)
    assert torch.equal(hbq.quantize_index(features, rounds), index)
    assert torch.equal(hbq.dequantize_bits(bits, rounds), values)
    assert torch.equal(hbq.dequantize_index(index, rounds), values)
    assert (values - features).abs().max().item() == golden[f"M{rounds}/max_abs_error"].item() <= 2.0**-rounds


def test_golden_file_is_the_one_of_the_manifest():
    import hashlib

    entry = json.loads((GOLDEN / "hbq_cases.json").read_text())["hbq_quant.safetensors"]
    assert hashlib.sha256((GOLDEN / "hbq_quant.safetensors").read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds", [1, 4, 8])
def test_ties_and_their_neighbours_follow_the_definition(dtype, rounds):
    grid = torch.arange(-256, 257, dtype=torch.float64) / 256
    grid = grid.to(dtype)
    one = torch.ones((), dtype=dtype)
    features = torch.cat([grid, torch.nextafter(grid, -one), torch.nextafter(grid, one)]).clamp(-1, 1)
    assert torch.equal(hbq.quantize_bits(features[:, None], rounds), recursion(features, rounds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_ties_low_and_the_smallest_positive_number_does_not(dtype, flush):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    features = torch.tensor([0.0, -0.0, tiny, -tiny], dtype=dtype) if not flush else torch.tensor(
        [0.0, -0.0], dtype=dtype)
    assert hbq.quantize_index(features, 4).tolist() == [7, 7, 8, 7][:len(features)]


def test_requantising_values_gives_the_same_labels():
    for rounds in ROUNDS:
        labels = torch.arange(2**rounds, dtype=torch.uint8)
        assert torch.equal(hbq.quantize_index(hbq.dequantize_index(labels, rounds), rounds), labels)


def test_values_outside_the_range_take_the_outermost_label():
    assert hbq.quantize_index(torch.tensor([-3.0, 3.0, float("inf"), -float("inf")]), 3).tolist() == [0, 7, 7, 0]


def test_nan_is_refused():
    with pytest.raises(UserError, match="NaN"):
        hbq.quantize_bits(torch.tensor([[float("nan")]]), 2)


def test_whole_numbers_are_refused():
    with pytest.raises(UserError, match="floating-point"):
        hbq.quantize_index(torch.zeros(3, dtype=torch.int64), 2)


@pytest.mark.parametrize("rounds", [0, 9])
def test_rounds_outside_one_byte_are_refused(rounds):
    with pytest.raises(UserError, match="1 to 8"):
        hbq.quantize_index(torch.zeros(1), rounds)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_bits_and_index_convert_into_each_other(golden, rounds):
    bits, index = golden[f"M{rounds}/bits"], golden[f"M{rounds}/index"]
    assert torch.equal(hbq.bits_to_index(bits, rounds), index)
    assert torch.equal(hbq.index_to_bits(index, rounds), bits)
    assert torch.equal(hbq.bits_to_index(bits[0], rounds, dim=0), index[0])


def test_bit_channels_that_do_not_divide_by_the_rounds_are_refused():
    with pytest.raises(UserError, match="do not divide"):
        hbq.bits_to_index(torch.zeros(1, 7, 1, 1, 1, dtype=torch.uint8), 2)


def test_straight_through_gives_the_values_forward_and_the_identity_backward():
    features = (torch.rand(2, 3, 1, 2, 2) * 2 - 1).requires_grad_()
    quantised = hbq.quantize_straight_through(features, 4)
    expected = hbq.dequantize_index(hbq.quantize_index(features.detach(), 4), 4)
    torch.testing.assert_close(quantised.detach(), expected, rtol=0, atol=1e-7)
    weights = torch.rand_like(expected)
    (quantised * weights).sum().backward()
    assert torch.equal(features.grad, weights)


def test_token_major_puts_the_bits_of_a_token_side_by_side():
    labels = torch.arange(6 * 2 * 3 * 4).reshape(6, 2, 3, 4).to(torch.uint8)
    tokens = hbq.to_token_major(labels)
    assert tokens.shape == (2, 3, 4, 6) and tokens.is_contiguous()
    assert torch.equal(tokens[1, 2, 3], labels[:, 1, 2, 3])
    assert torch.equal(hbq.to_channel_major(tokens), labels)
    assert torch.equal(hbq.to_channel_major(hbq.to_token_major(labels[None])), labels[None])


def test_packing_is_numpys_big_endian_order_and_equals_the_reference_cache(golden):
    bits = golden["M4/bits"][:1]
    assert tuple(golden["token_cache/shape"].tolist()) == tuple(bits.shape)
    assert hbq.pack_bits(bits) == golden["token_cache/data"].numpy().tobytes()
    assert torch.equal(hbq.unpack_bits(golden["token_cache/data"].numpy(), bits.shape), bits)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 2, 64), (2, 1, 3, 5)])
def test_packed_bits_come_back(shape):
    bits = torch.from_numpy(np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8))
    data = hbq.pack_bits(bits)
    assert len(data) == (bits.numel() + 7) // 8
    back = hbq.unpack_bits(data, shape)
    assert back.dtype == torch.uint8 and torch.equal(back, bits)


def test_a_time_slice_of_whole_bytes_is_a_byte_range():
    bits = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (3, 2, 2, 64), dtype=np.uint8))
    data = hbq.pack_bits(bits)
    assert torch.equal(hbq.unpack_bits(data[32:64], (1, 2, 2, 64)), bits[1:2])


def test_bytes_of_another_length_are_refused():
    with pytest.raises(UserError, match="2 bytes do not hold"):
        hbq.unpack_bits(b"ab", (1, 1, 1, 24))


def test_values_that_are_no_bits_are_refused():
    with pytest.raises(UserError, match="only 0 and 1"):
        hbq.pack_bits(torch.tensor([0, 1, 2], dtype=torch.uint8))

"""Text states as bytes: what is written comes back, and nothing else is taken."""

from __future__ import annotations

import pytest
import torch

from grn_scale.data.text_payload import pack_states, payload_bytes, quantize, unpack_states


def states_of(tokens: int, hidden: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    spread = torch.logspace(-6, 6, max(1, tokens))[:tokens, None]
    return (torch.randn(tokens, hidden, generator=generator) * spread).to(torch.bfloat16)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_bf16_states_come_back_bit_for_bit(tokens):
    states = states_of(tokens)
    data = pack_states(states, "bf16")
    assert len(data) == payload_bytes(tokens, 48, "bf16") == tokens * 48 * 2
    assert torch.equal(unpack_states(data, tokens, 48, "bf16"), states)


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_int8_states_come_back_within_half_a_step_of_each_token(tokens):
    states = states_of(tokens)
    data = pack_states(states, "int8")
    assert len(data) == payload_bytes(tokens, 48, "int8") == tokens * (48 + 4)
    back = unpack_states(data, tokens, 48, "int8")
    assert back.dtype == torch.bfloat16 and back.shape == states.shape
    exact, scales = states.double(), states.double().abs().amax(1, keepdim=True) / 127 if tokens else 0.0
    # rounding to int8, and of the product to bf16
    assert ((back.double() - exact).abs() <= scales * 0.501 + exact.abs() * 2**-8).all()


def test_a_token_keeps_its_largest_value_and_zero_rows_stay_zero():
    states = torch.zeros(3, 8, dtype=torch.bfloat16)
    states[0, 5], states[2, 1] = -3.5, 1e-40  # below the smallest normal number
    back = unpack_states(pack_states(states, "int8"), 3, 8, "int8")
    assert back[0, 5] == -3.5 and not back[1].any() and back[2].abs().max() <= 1e-40


def test_halves_are_rounded_to_even():
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]], dtype=torch.bfloat16)
    values, scales = quantize(row)
    assert scales.tolist() == [1.0] and values.tolist() == [[127, 0, 2, 2, 0, -2, -127]]


def test_the_bytes_are_little_endian_and_scales_come_first():
    states = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    assert pack_states(states, "bf16") == bytes.fromhex("803f 00c0")
    assert pack_states(states, "int8")[4:] == bytes([64, 256 - 127])


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_slices_and_readonly_bytes_are_taken_and_the_result_is_its_own(kind):
    wide = states_of(6, 96)
    states = wide[::2, ::2]
    data = pack_states(states, kind)
    first = unpack_states(memoryview(data), 3, 48, kind)
    first.zero_()
    assert unpack_states(data, 3, 48, kind).any()
    assert pack_states(states.contiguous(), kind) == data


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_another_length_is_refused(kind):
    data = pack_states(states_of(3), kind)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ValueError, match="bytes of text states, but 3 tokens"):
            unpack_states(wrong, 3, 48, kind)
    with pytest.raises(ValueError, match="2 tokens of 48"):
        unpack_states(data, 2, 48, kind)


def test_what_is_no_payload_of_states_is_refused():
    with pytest.raises(ValueError, match="bf16"):
        pack_states(torch.zeros(2, 3), "bf16")
    with pytest.raises(ValueError, match="bf16"):
        pack_states(torch.zeros(3, dtype=torch.bfloat16), "int8")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="inf or NaN"):
            pack_states(torch.full((2, 3), bad, dtype=torch.bfloat16), "int8")
    with pytest.raises(ValueError, match="'none'"):
        pack_states(torch.zeros(2, 3, dtype=torch.bfloat16), "none")
    with pytest.raises(ValueError, match="'int4'"):
        unpack_states(b"", 0, 3, "int4")
    for scale in ("0000807f", "0000c07f", "000080bf"):  # inf, NaN, -1
        with pytest.raises(ValueError, match="negative, inf or NaN"):
            unpack_states(bytes.fromhex(scale) + bytes(4), 1, 4, "int8")

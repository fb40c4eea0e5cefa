"""The peak of a process's memory: since the last call, and compared over the ranks."""

from __future__ import annotations

import torch

from grn_scale.train import memory
from grn_scale.train.memory import CLEAR, Held, PeakMemory, summary

SIZE = 64 << 20


def test_a_peak_belongs_to_the_calls_between_which_it_was() -> None:
    peak = PeakMemory(torch.device("cpu"))
    block = bytearray(b"1") * SIZE
    with_block = peak()
    del block
    peak()  # the peak before still holds what the last call left
    after = peak()
    assert with_block.reserved is None and with_block.used > SIZE
    if CLEAR.exists():
        assert after.used < with_block.used - SIZE // 2


def test_a_system_that_does_not_reset_the_peak_gives_that_since_the_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    assert PeakMemory(torch.device("cpu"))().used > 1 << 20


def test_the_fullest_rank_is_named_with_what_is_counted() -> None:
    assert summary([Held(10, None), Held(30, None), Held(20, None)]) == {
        "peak_memory_bytes": 30, "peak_memory_bytes_min": 10, "peak_memory_rank": 1, "peak_memory_of": "process"}
    row = summary([Held(10, 40), Held(30, 35)])
    assert (row["peak_memory_of"], row["peak_reserved_bytes"], row["peak_memory_rank"]) == ("GPU", 40, 1)

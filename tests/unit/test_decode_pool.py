"""Decoding in child processes: order, hangs, crashes, clean end."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest, decode_clip
from grn_scale.data.decode_pool import DecodePool
from grn_scale.errors import UserError
from tests.helpers.media import numbered_frames, numbers, write_video


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", numbered_frames(40))


def request_of(path: Path, begin: int = 0) -> DecodeRequest:
    return DecodeRequest(str(path), 24, 9, begin_frame=begin, height=32, width=64)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_results_come_in_order_and_equal_those_of_one_process(clip, tmp_path):
    requests = [request_of(clip, begin) for begin in range(12)]
    requests[5] = request_of(tmp_path / "none.mp4")
    with DecodePool(2, timeout_seconds=60) as pool:
        results = list(pool.map(requests))
        pids = pool.worker_pids()
    assert [request for request, _ in results] == requests
    for begin, (request, result) in enumerate(results):
        if begin == 5:
            assert isinstance(result, DecodeError) and result.reason == "missing"
            continue
        assert numbers(result.frames) == list(range(begin, begin + 9))
        here = decode_clip(request)
        np.testing.assert_array_equal(result.frames, here.frames)
        assert (result.backend, result.ratio_key, result.source_fps) == (here.backend, here.ratio_key, here.source_fps)
        result.frames[0] = 0  # the caller owns the frames
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


def test_a_hang_costs_one_clip_and_the_process(clip):
    with DecodePool(1, timeout_seconds=3) as pool:
        (_, first), = pool.map([request_of(clip)])
        assert isinstance(first, DecodedClip)
        stuck, = pool.worker_pids()
        os.kill(stuck, signal.SIGSTOP)
        (_, late), (_, next_one) = pool.map([request_of(clip), request_of(clip, 3)])
        assert isinstance(late, DecodeError) and late.reason == "timeout" and "3 s" in late.detail
        assert numbers(next_one.frames)[0] == 3
        assert gone(stuck)


def test_a_crash_costs_one_clip(clip):
    with DecodePool(1, timeout_seconds=60) as pool:
        list(pool.map([request_of(clip)]))
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        (_, crashed), (_, next_one) = pool.map([request_of(clip), request_of(clip, 3)])
    assert isinstance(crashed, DecodeError) and crashed.reason == "crashed" and str(clip) in crashed.detail
    assert numbers(next_one.frames)[0] == 3


def test_requests_are_read_only_a_little_ahead(clip):
    taken = []

    def requests():
        for begin in range(30):
            taken.append(begin)
            yield request_of(clip, begin)

    with DecodePool(1, timeout_seconds=60) as pool:
        results = pool.map(requests())
        next(results)
        assert len(taken) <= 3
        results.close()


def test_processes_that_cannot_start_stop_the_run_with_a_reason(clip, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecodePool(1, timeout_seconds=60) as pool, pytest.raises(UserError, match="did not start.*doctor"):
        list(pool.map([request_of(clip)]))

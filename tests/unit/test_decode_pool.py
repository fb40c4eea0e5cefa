"""Decoding in child processes: order, hangs, crashes, memory, false replies, clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

import grn_scale
from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest, Media, decode_clip, probe
from grn_scale.data.decode_child import DecodeChild
from grn_scale.data.decode_pool import DecodePool
from grn_scale.errors import ConfigError, UserError
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
        assert 0 < pool.busy_seconds
    assert [request for request, _ in results] == requests
    for begin, (request, result) in enumerate(results):
        if begin == 5:
            assert isinstance(result, DecodeError) and result.reason == "missing"
            continue
        assert numbers(result.frames) == list(range(begin, begin + 9))
        here = decode_clip(request)
        np.testing.assert_array_equal(result.frames, here.frames)
        assert (result.provenance, result.ratio_key) == (here.provenance, here.ratio_key)
        result.frames[0] = 0  # the caller owns the frames, and nobody else's change
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
        os.kill(pool.worker_pids()[0], signal.SIGSEGV)
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


def test_children_killed_from_outside_cost_nothing(clip):
    requests = [request_of(clip, begin % 30) for begin in range(40)]
    with DecodePool(2, timeout_seconds=60) as pool:
        for number, (request, result) in enumerate(pool.map(requests)):
            assert numbers(result.frames) == list(range(request.begin_frame, request.begin_frame + 9))
            if number in (3, 9, 10, 21):
                os.kill(pool.worker_pids()[number % 2], signal.SIGKILL)
    assert number == 39


def test_a_clip_on_which_one_child_after_the_other_is_killed_is_given_up(clip, monkeypatch):
    ask = DecodeChild.ask

    def killed(child, question):
        ask(child, {"probe": {"path": str(clip), "member": None}})  # it has started
        os.kill(child.process.pid, signal.SIGKILL)
        return ask(child, question)

    with DecodePool(1, timeout_seconds=60) as pool:
        list(pool.map([request_of(clip)]))
        monkeypatch.setattr(DecodeChild, "ask", killed)
        ((_, crashed),) = pool.map([request_of(clip)])
        monkeypatch.undo()
        ((_, sound),) = pool.map([request_of(clip)])
    assert crashed.reason == "crashed" and "killed from outside" in crashed.detail
    assert len(sound.frames) == 9


ANSWERS = {
    "no JSON": "echo garbage",
    "a value that is no reply": "echo 17",
    "somebody else's reply": """echo '{"number": 2, "spent": false, "reason": "missing", "detail": ""}'""",
    "fewer frames than told": """echo '{"number": 1, "spent": false, "clip": {}, "shape": [9, 32, 64, 3]}'""",
    "half a reply": """printf '{"number": 1, "sp'; exit 1""",
    "garbage without end": "while printf '%65536s' x; do :; done",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_false_reply_costs_one_clip(clip, tmp_path, monkeypatch, answer):
    fake = tmp_path / "python"
    fake.write_text(f"""#!/bin/sh\necho '{{"ready": true}}'\nread request\n{ANSWERS[answer]}\nread more\n""")
    fake.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(fake))
        pool = DecodePool(1, timeout_seconds=30)
    with pool:
        (_, failed), (_, next_one) = pool.map([request_of(clip), request_of(clip, 3)])
    assert isinstance(failed, DecodeError) and failed.reason == "crashed" and str(clip) in failed.detail
    assert numbers(next_one.frames)[0] == 3


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Frames of 4K take 12 MB each, and the decoder keeps several."""
    return write_video(tmp_path_factory.mktemp("media") / "4k.mp4", numbered_frames(5, 2160, 3840),
                       options={"preset": "ultrafast", "refs": "4"})


def test_too_little_memory_costs_one_clip_and_the_process(clip, large):
    with DecodePool(1, timeout_seconds=60, memory_megabytes=235) as pool:
        (_, first), (_, too_large), (_, next_one) = pool.map([request_of(clip), request_of(large), request_of(clip, 3)])
    assert isinstance(first, DecodedClip) and numbers(next_one.frames)[0] == 3
    assert isinstance(too_large, DecodeError) and too_large.reason == "out_of_memory"
    assert str(large) in too_large.detail and "235 MB of tokenize.decode_memory_megabytes" in too_large.detail
    with DecodePool(1, timeout_seconds=60) as pool:
        (_, enough), = pool.map([request_of(large)])
    assert numbers(enough.frames) == list(range(5))


def test_frames_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(clip):
    with DecodePool(1, timeout_seconds=60, memory_megabytes=1024) as pool:
        (_, vast), (_, next_one) = pool.map([DecodeRequest(str(clip), 24, 9, height=16000, width=16000),
                                             request_of(clip, 3)])
    assert vast.reason == "out_of_memory" and "9 frames of 16000 x 16000" in vast.detail
    assert numbers(next_one.frames)[0] == 3


def test_closing_in_the_middle_of_work_is_quick(large):
    with DecodePool(2, timeout_seconds=60) as pool:
        results = pool.map(request_of(large) for _ in range(50))
        next(results)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    results.close()


@pytest.mark.parametrize(("megabytes", "reason"), [(160, "out_of_memory"), (4096, "crashed")])
def test_native_code_that_ends_for_want_of_memory_is_told_from_other_crashes(clip, tmp_path, monkeypatch, megabytes,
                                                                             reason):
    fake = tmp_path / "python"
    fake.write_text(f"""#!{sys.executable}
import os, sys
print('{{"ready": true}}', flush=True)
sys.stdin.readline()
taken = bytearray(os.urandom(1)) * (100 << 20)
os.abort()
""")
    fake.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(fake))
        pool = DecodePool(1, timeout_seconds=60, memory_megabytes=megabytes)
    with pool:
        (_, failed), = pool.map([request_of(clip)])
    assert failed.reason == reason and str(clip) in failed.detail


def test_a_memory_limit_below_what_a_process_takes_is_refused():
    with pytest.raises(ConfigError, match="decode_memory_megabytes is 100, but must be at least 512"):
        TokenizeConfig(decode_memory_megabytes=100)


def test_probing_gives_the_facts_in_order_of_files_and_members(clip, tmp_path):
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        tar.add(clip, "a.mp4")
    files = [clip, str(tmp_path / "none.mp4"), Media(str(tmp_path / "clips.tar"), "a.mp4"),
             Media(str(tmp_path / "clips.tar"), "b.mp4"), Media(str(clip))]
    with DecodePool(2, timeout_seconds=60) as pool:
        found = list(pool.probe(iter(files)))
    assert [file for file, _ in found] == files
    infos = [info for _, info in found]
    assert infos[0] == infos[2] == infos[4] == probe(clip)
    assert [error.reason for error in (infos[1], infos[3])] == ["missing", "missing"]


def test_a_decoder_that_hangs_ends_by_itself_where_nobody_is_left_to_end_it(clip):
    code = """if True:
        import os, sys
        from grn_scale.data import decode_worker
        decode_worker.GRACE_SECONDS = 0
        def hang(*_):
            while True: pass
        decode_worker.decode_clip = hang
        decode_worker.main(os.memfd_create("frames"), 0.1, 4096)"""
    request = {"decode": {"path": str(clip), "fps": 24, "max_frames": 9, "latent_side": 2, "member": None},
               "number": 1}
    done = subprocess.run([sys.executable, "-c", code], input=f"{json.dumps(request)}\n".encode(), timeout=60,
                          capture_output=True, cwd=Path(grn_scale.__file__).parents[1], check=False)
    assert done.returncode == -signal.SIGALRM and done.stdout == b'{"ready": true}\n'


def test_nothing_is_left_open_when_the_pool_ends(clip):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with DecodePool(2, timeout_seconds=60) as pool:
            results = pool.map(request_of(clip, begin) for begin in range(9))
            next(results)
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
            next(results)
            results.close()
    assert set(os.listdir("/proc/self/fd")) == before

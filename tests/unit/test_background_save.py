"""Saves beside training: what they keep, what they cost, and what happens when the storage refuses them."""

import json
import logging
import os
import resource
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from grn_scale.checkpoint import layout, load_weights
from grn_scale.checkpoint.background import FAILURES_IN_A_ROW, BackgroundSaver
from grn_scale.checkpoint.checkpoint import resolve_resume
from grn_scale.checkpoint.chunks import whole
from grn_scale.checkpoint.staging import ALIGNMENT, HostStaging, staging_bytes
from grn_scale.errors import UserError
from tests.helpers.checkpoints import at_event, chunks, in_child, no_pickle_in, same, weights


@contextmanager
def full_disk():
    """Files of this process may not grow beyond a few KB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def large():
    return {"model": [whole("w", torch.zeros(1 << 12))]}


# --- what is saved

@pytest.mark.parametrize("background", [True, False])
def test_a_save_holds_the_values_of_its_moment_whatever_training_does_next(tmp_path, background):
    tensors, state = weights(1), {"step": 1, "list": [1]}
    with BackgroundSaver(tmp_path, keep_last=9, background=background) as saver:
        saver.save(1, {"model": chunks(tensors)}, state)
        for tensor in tensors.values():
            tensor.fill_(-1)
        state["list"].append(2)
        saver.save(2, {"model": chunks(tensors), "ema": chunks(weights(5))}, state)
    assert same(load_weights(tmp_path / "step-00000001"), weights(1))
    assert same(load_weights(tmp_path / "step-00000002"), tensors)
    assert same(load_weights(tmp_path / "step-00000002", ema=True), weights(5))
    assert json.loads((tmp_path / "step-00000001/state.json").read_text())["list"] == [1]
    for step in (1, 2):
        layout.verify(tmp_path / f"step-0000000{step}")
        no_pickle_in(tmp_path / f"step-0000000{step}")


def test_views_with_odd_strides_are_saved_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    odd = {"transposed": base.T, "column": base[:, 2], "cell": base[0:1, 3:4].T, "every_second": base[::2, ::3],
           "half": base.bfloat16()[1:3, 1:5], "flag": torch.tensor(True)}
    for background in (True, False):
        run = tmp_path / str(background)
        with BackgroundSaver(run, keep_last=1, background=background) as saver:
            saver.save(1, {"model": chunks(odd)}, {})
        assert same(load_weights(run), odd)


def test_host_memory_is_allocated_once_and_grows_only_when_the_state_does():
    staging, small, more = HostStaging(), {"model": chunks(weights())}, {"model": chunks(weights()), **large()}
    assert staging_bytes(small) % ALIGNMENT == 0
    staging.reserve(staging_bytes(small))

    def places(sections):
        return [chunk.tensor.data_ptr() for part in staging.copy(sections).values() for chunk in part]

    first = places(small)
    assert places(small) == first and all(place % ALIGNMENT == 0 for place in first)
    assert places({"model": large()["model"]})[0] != 0
    grown = places(more)
    assert places(more) == grown and places(small)[0] == grown[0]
    staging.release()


def test_too_little_host_memory_says_how_to_do_without():
    with pytest.raises(UserError, match="train.background_save=false"):
        HostStaging().reserve(1 << 60)


def test_a_save_waits_for_the_one_before_and_counts_that_as_stall(tmp_path):
    with BackgroundSaver(tmp_path, keep_last=9) as saver:
        free = threading.Event()
        saver._thread.submit(free.wait)  # the writer is busy
        saver.save(1, {"model": chunks(weights())}, {})
        assert saver.busy
        threading.Timer(0.3, free.set).start()
        saver.save(2, {"model": chunks(weights())}, {})
        assert saver.stall_seconds > 0.1
        assert layout.newest_complete(tmp_path).name == "step-00000001"
        saver.wait()
        assert layout.newest_complete(tmp_path).name == "step-00000002"
        saver.wait()


@pytest.mark.parametrize("keep_every, left", [(0, [4, 5]), (2, [2, 4, 5]), (3, [3, 4, 5])])
def test_multiples_are_kept_for_good_besides_the_newest(tmp_path, keep_every, left):
    with BackgroundSaver(tmp_path, keep_last=2, keep_every=keep_every) as saver:
        for step in range(1, 6):
            saver.save(step, {"model": chunks(weights(step))}, {})
    assert sorted(int(path.name[-8:]) for path in tmp_path.iterdir()) == left


# --- what goes wrong

@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_reported_at_once_and_the_run_goes_on_with_the_next_save(tmp_path, caplog, background):
    with BackgroundSaver(tmp_path, keep_last=1, background=background) as saver:
        saver.save(1, large(), {})
        saver.wait()
        with full_disk():
            saver.save(2, large(), {})
            with pytest.raises(UserError, match="cannot write .*free space"):
                saver.wait()
            saver.save(3, large(), {})
            while saver.busy:
                time.sleep(0.01)
        assert "THE CHECKPOINT OF STEP 3 WAS NOT SAVED (failure 2 in a row; at 3 the run stops)" in caplog.text
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        saver.save(4, large(), {})
        saver.wait()
        assert saver._failures == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("background", [True, False])
def test_failures_in_a_row_stop_the_run(tmp_path, background):
    with pytest.raises(UserError, match="3 checkpoints in a row could not be saved, so the run stops.*free space"):
        with BackgroundSaver(tmp_path, keep_last=1, background=background) as saver, full_disk():
            for step in range(1, FAILURES_IN_A_ROW + 2):
                saver.save(step, large(), {})
    assert list(tmp_path.iterdir()) == []


def test_the_last_save_of_a_run_must_succeed(tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        with full_disk(), BackgroundSaver(tmp_path, keep_last=1) as saver:
            saver.save(1, large(), {})


def test_a_defect_is_never_tolerated(tmp_path):
    with BackgroundSaver(tmp_path, keep_last=1) as saver:
        with pytest.raises(TypeError, match="JSON"):
            saver.save(1, large(), {"x": torch.zeros(1)})
        saver.save(1, {"../x": []}, {})
        with pytest.raises(ValueError, match="section"):
            saver.save(2, large(), {})


def test_an_error_of_training_lets_the_save_in_flight_finish_and_stays_the_error(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError):
        with BackgroundSaver(tmp_path, keep_last=1) as saver:
            saver._thread.submit(time.sleep, 0.05)
            saver.save(1, large(), {})
            raise ZeroDivisionError("of training")
    layout.verify(tmp_path / "step-00000001")
    assert "leaving once the checkpoint in flight is written" in caplog.text
    with pytest.raises(ZeroDivisionError), full_disk():
        with BackgroundSaver(tmp_path, keep_last=1) as saver:
            saver.save(2, large(), {})
            raise ZeroDivisionError("of training")


@pytest.mark.parametrize("event, part", [("open", "rank-00000"), ("open", "SEAL"), ("os.rename", ".partial"),
                                         ("os.rename", "SEAL")])
def test_a_writer_that_is_killed_leaves_the_last_checkpoint(tmp_path, event, part):
    def killed():
        with BackgroundSaver(tmp_path, keep_last=1) as saver:
            saver.save(1, {"model": chunks(weights(1))}, {})
            saver.wait()
            at_event(event, part, lambda: os.kill(os.getpid(), signal.SIGKILL))
            saver.save(2, {"model": chunks(weights(2))}, {})

    assert os.WIFSIGNALED(in_child(killed))
    newest = resolve_resume("must", tmp_path)
    assert newest.name == "step-00000001" and same(load_weights(newest), weights(1))
    with BackgroundSaver(tmp_path, keep_last=1) as saver:
        saver.save(2, {"model": chunks(weights(2))}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("cut, message", [(True, "has 100 bytes instead of"), (False, "checksum differs")])
def test_a_file_damaged_while_it_is_saved_is_found_before_the_last_checkpoint_goes(tmp_path, cut, message):
    def damaged():
        with BackgroundSaver(tmp_path, keep_last=1) as saver:
            saver.save(1, {"model": chunks(weights(1))}, {})
            saver.wait()
            file = tmp_path / "step-00000002.partial/model/rank-00000.safetensors"

            def damage():
                size = file.stat().st_size
                os.truncate(file, 100 if cut else size - 1)
                if not cut:
                    os.truncate(file, size)

            at_event("open", "step-00000002.partial/state.json", damage)
            saver.save(2, {"model": chunks(weights(2))}, {})
            try:
                saver.wait()
            except UserError as error:
                os._exit(3 if message in str(error) else 4)

    assert os.waitstatus_to_exitcode(in_child(damaged)) == 3
    newest = resolve_resume("must", tmp_path)
    assert newest.name == "step-00000001" and same(load_weights(newest), weights(1))


def test_logs_say_where_a_checkpoint_went_and_how_long_it_took(tmp_path, caplog):
    with caplog.at_level(logging.INFO), BackgroundSaver(tmp_path, keep_last=1) as saver:
        saver.reserve(staging_bytes(large()))
        saver.save(1, large(), {})
    assert f"saved {tmp_path / 'step-00000001'} in 0." in caplog.text

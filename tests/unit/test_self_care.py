"""How a run looks after itself, as far as it needs no second process: votes, spikes, beats, reports."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from grn_scale.checkpoint.background import BackgroundSaver
from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.layout import newest_complete
from grn_scale.config.run_schema import SpikesConfig, StopConfig, WatchdogConfig
from grn_scale.config.schema import Config, LoggingConfig, TrainConfig
from grn_scale.data.state import DataState
from grn_scale.errors import ConfigError, DoNotRequeue, UserError
from grn_scale.train.board import Alarm, Board, Failure
from grn_scale.train.failures import JobFailed, errors_shared, first_line, lost_contact
from grn_scale.train.hang_report import headline, who_is_behind
from grn_scale.train.health import HealthFile, overview
from grn_scale.train.heartbeat import Beat, Heart, Moment, silent_ranks
from grn_scale.train.loop import Position
from grn_scale.train.metrics import MetricsLog, past_of_spikes, read_metrics
from grn_scale.train.progress import TrainingProgress
from grn_scale.train.resuming import goes_on
from grn_scale.train.rollback import Rollbacks, check_rollback
from grn_scale.train.spikes import SpikeJudge, Verdict
from grn_scale.train.stopping import StopRequest, deadline_of
from tests.helpers.checkpoints import chunks, weights


@pytest.mark.parametrize("section,value", [
    (StopConfig, {"time_limit_minutes": 2.0}), (StopConfig, {"time_limit_minutes": -1.0}),
    (StopConfig, {"margin_seconds": -1.0}), (SpikesConfig, {"window": 4}), (SpikesConfig, {"patience": 0}),
    (SpikesConfig, {"limit": -1}), (WatchdogConfig, {"step_seconds": -1.0}),
    (WatchdogConfig, {"heartbeat_seconds": 3.0}), (WatchdogConfig, {"straggler_ratio": 1.0})])
def test_settings_that_make_no_sense_are_refused_by_name(section, value) -> None:
    with pytest.raises(ConfigError, match=next(iter(value))):
        section(**value)


# -- stopping ----------------------------------------------------------------------------------------------------


def test_signals_are_noted_inside_and_ignored_once_all_agreed() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    with StopRequest(StopConfig(), None) as stop:
        assert stop.votes() == (0.0, 0.0) and stop.agreed((0.0, 0.0)) == ""
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.votes() == (1.0, 0.0)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == handlers
    try:
        with stop:
            assert "3 processes" in stop.agreed((3.0, 0.0))
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR2), handlers):
            signal.signal(number, handler)


def test_the_clock_stops_a_run_while_there_is_time_for_what_it_still_does() -> None:
    now = [1000.0]
    stop = StopRequest(StopConfig(margin_seconds=30), 2000.0, clock=lambda: now[0])
    assert stop.margin_seconds() == 30 and stop.votes() == (0.0, 0.0)
    for phase, seconds in (("step", 500), ("step", 50), ("save", 100), ("validate", 20)):
        stop.took(phase, seconds)
    assert stop.margin_seconds() == 2 * 500 + 2 * 100 + 20 and stop.votes() == (0.0, 1.0)
    for _ in range(20):
        stop.took("step", 50)
    assert stop.margin_seconds() == 2 * 50 + 2 * 100 + 20, "the first step, which compiles, does not count for ever"
    now[0] = 1679.0
    assert stop.votes() == (0.0, 0.0)
    now[0] = 1680.0
    assert stop.votes() == (0.0, 1.0) and stop.agreed((0.0, 1.0)) == "the time is up"


def test_the_deadline_is_the_earlier_of_limit_and_job_end(monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert deadline_of(StopConfig(), 100.0) is None
    assert deadline_of(StopConfig(time_limit_minutes=10), 100.0) == 700.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "500")
    assert deadline_of(StopConfig(time_limit_minutes=10), 100.0) == deadline_of(StopConfig(), 100.0) == 500.0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "UNLIMITED")
    assert deadline_of(StopConfig(), 100.0) is None


# -- spikes ------------------------------------------------------------------------------------------------------


def judged(losses, **settings) -> list[Verdict]:
    judge = SpikeJudge(SpikesConfig(**{"window": 8, "threshold": 5.0, "patience": 3, **settings}))
    return [judge.judge(step, loss) for step, loss in enumerate(losses, 1)]


CALM = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]
FINE, SUSPICIOUS, SPIKE = Verdict


def test_a_spike_is_a_run_of_losses_far_above_the_recent_ones() -> None:
    assert judged([*CALM, 3.0, 3.0, 3.0, 1.0])[8:] == [SUSPICIOUS, SUSPICIOUS, SPIKE, FINE]
    assert judged([*CALM, 3.0, 3.0, 1.0, 3.0])[8:] == [SUSPICIOUS, SUSPICIOUS, FINE, SUSPICIOUS], "not in a row"
    assert judged([*CALM, 0.1, 0.1, 0.1])[8:] == [FINE] * 3, "a loss may fall"
    assert judged([*CALM[:7], 9.0, 9.0, 9.0]) [:8] == [FINE] * 8, "nothing is judged before the window is full"
    assert judged([*CALM, 9.0, 9.0, 9.0], enabled=False) == [FINE] * 11


def test_a_loss_that_is_not_finite_neither_clears_nor_makes_a_suspicion() -> None:
    assert judged([*CALM, math.nan, 3.0, math.inf, 3.0, 3.0])[8:] == [FINE, SUSPICIOUS, SUSPICIOUS, SUSPICIOUS, SPIKE]


def test_losses_that_hardly_vary_do_not_make_the_next_one_suspicious() -> None:
    assert judged([0.5] * 8 + [0.5004, 0.51])[8:] == [FINE, SUSPICIOUS]


def test_a_slow_rise_is_no_spike() -> None:
    assert set(judged([1.0 + 0.02 * step + 0.05 * (step % 3) for step in range(100)])) == {FINE}


def test_going_back_keeps_the_data_position_and_ends_for_good_at_the_limit(tmp_path) -> None:
    position, newest = Position(17, 170, DataState("s", position=17), 17), [12]
    with (MetricsLog(tmp_path, 0, LoggingConfig()) as metrics, TrainingProgress(20, 0, shown=False) as progress):
        rollbacks = Rollbacks(SpikesConfig(limit=3), lambda before: newest[0] and min(newest[0], before - 1), metrics,
                              progress, before=1)
        for step in range(1, 18):
            metrics.write(step, {"loss": float(step)})
        assert rollbacks.go_back(position, 13, 9.0, 2.0) == replace(position, step=11), "12 made the loss of 13"
        assert rollbacks.go_back(position, 15, 9.0, 2.0) == replace(position, step=12)
        metrics.write(13, {"loss": 0.5})
        with pytest.raises(DoNotRequeue, match=r"4\. of this run \(spikes.limit=3, over all its"):
            rollbacks.go_back(position, 15, 9.0, 2.0)
        newest[0] = None
        rollbacks = Rollbacks(SpikesConfig(limit=1), lambda before: newest[0], metrics, progress)
        assert rollbacks.go_back(position, 15, 9.0, 2.0) == position, "no checkpoint yet"
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 12)) and rows[-1]["loss"] == 11.0
    assert past_of_spikes(tmp_path, 2) == ([(10, 10.0), (11, 11.0)], 4), "also where it could not go back"
    assert past_of_spikes(tmp_path / "new", 3) == ([], 0)


def test_going_back_needs_a_checkpoint_before_the_newest() -> None:
    check_rollback(Config())
    check_rollback(Config(train=TrainConfig(keep_last=1), spikes=SpikesConfig(enabled=False)))
    with pytest.raises(ConfigError, match="keep_last=2"):
        check_rollback(Config(train=TrainConfig(keep_last=1)))


def test_a_run_that_goes_on_judges_by_the_losses_before() -> None:
    judge = SpikeJudge(SpikesConfig(window=8, threshold=5.0, patience=2), enumerate(CALM, 1))
    assert [judge.judge(step, loss) for step, loss in ((9, 1.0), (10, 3.0), (11, 3.0))] == [FINE, SUSPICIOUS, SPIKE]
    assert judge.rising_since == 10


def test_a_rise_begins_before_its_first_suspicious_loss() -> None:
    judge = SpikeJudge(SpikesConfig(window=8, threshold=5.0, patience=2), enumerate(CALM, 1))
    rise = ((9, 1.0), (10, 1.35), (11, 1.4), (12, 3.0))
    assert [judge.judge(step, loss) for step, loss in rise] == [FINE, FINE, FINE, SUSPICIOUS]
    assert judge.rising_since == 10
    judge = SpikeJudge(SpikesConfig(window=8, threshold=5.0), [*enumerate(CALM, 1), (19, 1.35)])
    assert (judge.judge(13, 3.0), judge.rising_since) == (SUSPICIOUS, 13), "losses that a rollback left behind"


# -- watchdog ----------------------------------------------------------------------------------------------------


def test_each_phase_has_its_limit_and_the_first_step_its_own() -> None:
    heart = Heart()
    limits = [heart.now.limit]
    for phase, step in (("validate", 7), ("data", 8), ("step", 8), ("data", 9), ("step", 9), ("save", 9),
                        ("restore", 9), ("data", 8), ("end", 9)):
        heart.enter(phase, step)
        limits.append(heart.now.limit)
    assert limits == ["start_seconds", "validate_seconds", "first_step_seconds", "first_step_seconds", "step_seconds",
                      "step_seconds", "save_seconds", "start_seconds", "first_step_seconds", "save_seconds"]
    assert all(hasattr(WatchdogConfig(), limit) for limit in limits)


def beat(rank: int, phase: str = "step", step: int = 5, where: tuple[str, ...] = ("torch/distributed/c.py:1 f",),
         count: int = 3) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, count, phase, step, 9.0, ("clip1",), 0, where)


def test_who_is_behind_follows_from_the_answers() -> None:
    assert who_is_behind([beat(0), None, beat(2)]) == [1], "no answer"
    assert who_is_behind([beat(0), beat(1), beat(2, step=4)]) == [2], "lowest step"
    assert who_is_behind([beat(0), beat(1, "data"), beat(2)]) == [1], "earlier phase"
    assert who_is_behind([beat(0, "save"), beat(1, "data", 6), beat(2, "data", 6)]) == [0], "the save of step 5"
    assert who_is_behind([beat(0), beat(1, where=("decode.py:7 read",))]) == [1], "waits for nobody"
    apart = [beat(rank, where=(f"{'a' if rank else 'b'}.py:7 f",)) for rank in range(3)]
    assert who_is_behind(apart) == [0], "elsewhere than most"
    assert who_is_behind([beat(0), beat(1)]) == []


def test_the_message_names_ranks_samples_and_the_setting() -> None:
    alarm = Alarm(0, "rank 0 is in step of step 5 for 9 s", "watchdog.step_seconds (8)", "runs/a/hangs/x")
    text = headline(alarm, [beat(0), beat(1, "data"), beat(2)], [])
    assert "behind is rank 1 on node1 (process 101): step 5, data for 9 s" in text and "samples clip1" in text
    assert "2 in step of step 5" in text and "runs/a/hangs/x" in text and "raise watchdog.step_seconds (8)" in text
    text = headline(alarm, [beat(0), None], [beat(0), beat(1, "save")])
    assert "no answer from rank 1 on node1" in text and "save for 9 s" in text
    many = headline(alarm, [beat(0)] + [None] * 20, [beat(rank) for rank in range(21)])
    assert "and 12 more" in many
    assert "no process differs" in headline(alarm, [beat(0), beat(1)], [])


def test_a_board_keeps_the_first_alarm_and_the_first_failure() -> None:
    store = dist.HashStore()
    boards = [Board(store, "run", rank, 2) for rank in range(2)]
    assert boards[0].alarm() is None and boards[0].failure() is None and not boards[0].closed()
    for board in boards:
        board.raise_alarm(Alarm(board.rank, "r", "l", "f"))
        board.fail(Failure(board.rank, "host", 78, "message"))
        board.post(beat(board.rank))
    assert boards[1].alarm() == Alarm(0, "r", "l", "f") and boards[1].failure() == Failure(0, "host", 78, "message")
    assert boards[0].beats() == [beat(0), beat(1)] and boards[0].beat(1) == beat(1)
    boards[1].answer(beat(1))
    assert not boards[0].all_answered() and boards[0].answers() == [None, beat(1)]
    boards[0].close()
    assert boards[1].closed()


def test_a_beat_carries_the_first_samples_and_survives_json() -> None:
    made = Beat.of(Moment("step", 3, False, tuple(f"clip{i}" for i in range(40)), 0.0), 1, 7, ["a.py:1 f"])
    assert len(made.samples) == 32 and made.more_samples == 8 and made.host == socket.gethostname()
    assert Beat.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_silent_ranks_are_those_whose_beat_stands_still_before_their_end() -> None:
    before = [beat(0), beat(1), beat(2, "end")]
    assert silent_ranks(before, [beat(0, count=4), beat(1), beat(2, "end")]) == [1]
    assert overview([beat(0), beat(1, "data", 4)]) == {
        "world_size": 2, "step": 5, "lowest_step": 4, "highest_step": 5, "phases": {"step": 1, "data": 1}}


# -- failures ----------------------------------------------------------------------------------------------------


def test_an_error_of_a_process_is_published_and_raised_again() -> None:
    board, heart = Board(dist.HashStore(), "run", 1, 2), Heart()
    with pytest.raises(DoNotRequeue), errors_shared(board, heart):
        raise DoNotRequeue("spent:\n  all of it")
    assert board.failure() == Failure(1, socket.gethostname(), 78, "spent: all of it") and heart.failed_with == 78


def test_the_health_file_says_soon_that_another_process_failed(tmp_path) -> None:
    store, heart = dist.HashStore(), Heart()
    boards = [Board(store, "run", rank, 2) for rank in range(2)]
    for board in boards:
        board.post(beat(board.rank))
    heart.enter("step", 5)
    with HealthFile(tmp_path, boards[0], heart):
        boards[1].fail(Failure(1, "node1", 1, "on fire"))
        until = time.monotonic() + 10
        while not (tmp_path / "health.json").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert json.loads((tmp_path / "health.json").read_text())["state"] == "failed"


def test_only_a_run_that_starts_looks_at_what_it_may_start_from(tmp_path) -> None:
    path = save_checkpoint(tmp_path, 1, {"model": chunks(weights())}, {}, keep_last=1)
    assert [goes_on(str(tmp_path), mode) for mode in ("none", "auto", "must", "/a")] == [False, True, True, True]
    path.rename(path.with_name(path.name + ".doubtful"))
    assert not goes_on(str(tmp_path), "auto") and not goes_on(str(tmp_path / "new"), "auto")


def test_losing_contact_is_explained_by_the_error_of_another_process() -> None:
    store = dist.HashStore()
    other, board, heart = Board(store, "run", 1, 2), Board(store, "run", 0, 2), Heart()
    for one in (other, board):
        one.post(beat(one.rank))
    other.fail(Failure(1, "node1", 2, "bad key"))
    with pytest.raises(JobFailed, match="rank 1 on node1 failed: bad key") as raised, errors_shared(board, heart):
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]")
    assert raised.value.exit_code == heart.failed_with == 2 and isinstance(raised.value, UserError)


def test_a_store_that_answers_late_changes_no_exit_code() -> None:
    """A thread that comes back from such a call at the end of the interpreter ends the process with signal 6."""
    program = """
        import threading, torch.distributed as dist
        from pathlib import Path
        from grn_scale.command_line import run
        from grn_scale.config.run_schema import WatchdogConfig
        from grn_scale.errors import DoNotRequeue
        from grn_scale.train import failures, heartbeat, watchdog
        from grn_scale.train.board import Board

        watchdog.LEAVE_SECONDS = watchdog.BEAT_SECONDS = 0.1
        store, asked = dist.TCPStore("127.0.0.1", 0, 1, True), threading.Event()
        slow = dist.TCPStore("127.0.0.1", store.port, is_master=False)
        board, heart = Board(store, "run", 0, 1), heartbeat.Heart()

        def main(_):
            with watchdog.Watchdog(WatchdogConfig(), Path("run"), board, heart):
                board.post = lambda beat: [(asked.set(), slow.add("times", 1)) for _ in iter(int, 1)]
                asked.wait()
                with failures.errors_shared(board, heart):
                    raise DoNotRequeue("the limit is spent")

        raise SystemExit(run(main))
    """
    end = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert end.returncode == 78 and end.stderr.endswith("error: the limit is spent\n"), end


def test_an_error_is_told_before_the_save_in_flight_is_waited_for(tmp_path) -> None:
    board, heart, free, told = Board(dist.HashStore(), "run", 1, 2), Heart(), threading.Event(), []

    def look() -> None:
        while board.failure() is None:
            time.sleep(0.01)
        told.append((str(board.failure()), heart.saving()))
        free.set()

    watcher = threading.Thread(target=look, daemon=True)
    with (pytest.raises(ValueError), errors_shared(board, heart), BackgroundSaver(tmp_path, keep_last=2) as saver,
          errors_shared(board, heart)):
        heart.saving = lambda: saver.busy
        saver._thread.submit(free.wait, 10)  # the writer is busy
        saver.save(1, {"model": chunks(weights())}, {})
        watcher.start()
        raise ValueError("on fire")
    assert told == [(f"rank 1 on {socket.gethostname()} failed: ValueError: on fire", True)]
    assert newest_complete(tmp_path).name == "step-00000001" and not heart.saving()


def test_only_broken_collectives_count_as_lost_contact() -> None:
    assert lost_contact(dist.DistBackendError("x")) and lost_contact(RuntimeError("NCCL error: remote process exited"))
    assert not lost_contact(RuntimeError("shapes differ")) and not lost_contact(ValueError("gloo/"))
    assert first_line(RuntimeError("a\nb")) == "RuntimeError: a" and first_line(UserError("a\n b")) == "a b"

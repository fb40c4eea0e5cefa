"""A thread in each process that gives its signs of life and sees when the job hangs or another process failed.

Limits are watched where the time passes: every process watches its own phases, and that the next rank still gives signs
of life. Whoever finds something raises an alarm on the board; all see it within seconds, write down their stacks, say
where they are, and end with exit code 79 once the finder has written who is behind.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from grn_scale.config.run_schema import WatchdogConfig
from grn_scale.errors import EXIT_FAILED, EXIT_HANG
from grn_scale.train.board import Alarm, Board, Failure
from grn_scale.train.failures import BEAT_SECONDS, CONTACT_SECONDS, LEAVE_SECONDS
from grn_scale.train.hang_report import headline, innermost_calls, write_report, write_stacks
from grn_scale.train.heartbeat import Beat, Heart

REPORT_SECONDS = 20.0
"""Time for stacks and report; then a process ends without them."""
log = logging.getLogger("grn_scale.train")


class Watchdog:
    """A context manager around everything that a process of a run does; to be made in the thread that trains."""

    def __init__(self, settings: WatchdogConfig, run_folder: Path, board: Board, heart: Heart) -> None:
        self._settings, self._board, self._heart = settings, board, heart
        self._hangs = run_folder / "hangs"
        self._trained = threading.get_ident()
        self._count = 0
        self._next = (board.rank + 1) % board.size
        self._next_beat, self._next_seen = -1, time.monotonic()
        self._failed_since: float | None = None
        self._leaving_since = 0.0
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="grn-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._renew_last_resort()
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._left.set()
        self._thread.join(LEAVE_SECONDS)
        faulthandler.cancel_dump_traceback_later()
        if self._thread.is_alive() and self._heart.failed_with is not None:
            # It waits for a store that is slow. Coming back to an interpreter that ends it would abort the process,
            # and the exit code, which says whether to start again, would be that of the signal.
            _say(f"error: {error}")
            os._exit(self._heart.failed_with)

    def _watch(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            self._renew_last_resort()
            try:
                self._look()
            except dist.DistError as error:
                if self._heart.now.phase != "end":
                    self._without_store(error)
                return

    def _renew_last_resort(self) -> None:
        """A thread in C ends the process (exit code 1, stacks on stderr) where native code keeps the interpreter's lock
        for so long that this thread does not run."""
        if self._settings.heartbeat_seconds:
            faulthandler.dump_traceback_later(2 * self._settings.heartbeat_seconds, exit=True, file=2)

    def _look(self) -> None:
        self._count += 1
        moment, board = self._heart.now, self._board
        board.post(Beat.of(moment, board.rank, self._count))
        if (alarm := board.alarm()) is not None:
            self._end_hang(alarm)
        failure = board.failure()
        if failure is not None or self._heart.failed_with is not None:
            self._leave(failure)
            return
        limit, seconds = getattr(self._settings, moment.limit), time.monotonic() - moment.since
        if limit and seconds > limit:
            self._alarm(f"rank {board.rank} is in {moment.phase} of step {moment.step} for {seconds:.0f} s",
                        f"watchdog.{moment.limit} ({limit:g})")
        elif self._next_silent():
            self._alarm(f"rank {self._next} gave no sign of life for {self._settings.heartbeat_seconds:g} s",
                        f"watchdog.heartbeat_seconds ({self._settings.heartbeat_seconds:g})")

    def _next_silent(self) -> bool:
        """Whether the next rank's beat stands still. One that has come to its end may stop beating."""
        beat = self._board.beat(self._next)
        if beat.count != self._next_beat or beat.phase == "end":
            self._next_beat, self._next_seen = beat.count, time.monotonic()
        limit = self._settings.heartbeat_seconds
        return bool(limit) and time.monotonic() - self._next_seen > limit

    def _alarm(self, reason: str, limit: str) -> None:
        folder = self._hangs / time.strftime("%Y%m%d-%H%M%S")
        self._board.raise_alarm(Alarm(self._board.rank, reason, limit, str(folder)))
        self._end_hang(self._board.alarm())

    def _end_hang(self, alarm: Alarm) -> None:
        """Does not return. Whatever hangs as well in here (storage, the store) must not keep the process."""
        last_word = threading.Timer(REPORT_SECONDS, os._exit, (EXIT_HANG,))
        last_word.daemon = True
        last_word.start()
        try:
            where = innermost_calls(self._trained)
            moment = self._heart.now
            beat = Beat.of(moment, self._board.rank, self._count, where)
            self._board.answer(beat)
            write_stacks(alarm, beat, moment)
            if alarm.rank == self._board.rank:
                self._report(alarm)
            else:
                while not self._board.closed():
                    time.sleep(BEAT_SECONDS / 4)
        except Exception as error:  # said, and the process ends all the same
            _say(f"rank {self._board.rank}: no complete report of the hang: {error!r}")
        finally:
            os._exit(EXIT_HANG)

    def _report(self, alarm: Alarm) -> None:
        until = time.monotonic() + CONTACT_SECONDS
        while not self._board.all_answered() and time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 4)
        answers = self._board.answers()
        text = headline(alarm, answers, self._board.beats())
        _say(f"error: {text}")
        try:
            write_report(alarm, text, answers)
        finally:
            self._board.close()
        time.sleep(BEAT_SECONDS / 2)  # the others leave first: this process may be the one that keeps the store

    def _leave(self, failure: Failure | None) -> None:
        """End the process where the error of some process has not ended it by itself: this main thread may be stuck
        with those that are gone. One that fails itself may finish the save in flight first, if no process that takes
        part in it is gone."""
        now, failing = time.monotonic(), self._heart.failed_with
        if self._failed_since is None:
            self._failed_since = self._leaving_since = now
        limit = self._settings.save_seconds or math.inf
        if failing is not None and self._heart.saving() and now - self._failed_since < limit:
            self._leaving_since = now
        if now - self._leaving_since < (CONTACT_SECONDS / 2 if failing is None else LEAVE_SECONDS):
            return
        if failure is not None:
            _say(f"error: {failure}")
        os._exit(failure.code if failing is None else failing)

    def _without_store(self, error: dist.DistError) -> None:
        if not self._left.wait(LEAVE_SECONDS):
            _say(f"error: the job's store has been out of reach for {LEAVE_SECONDS:.0f} s ({error}): rank 0, or "
                 "torchrun on the first node, has ended")
            os._exit(EXIT_FAILED)


def _say(message: str) -> None:
    """On stderr at once: the process may end right behind it, and the logger's lock may be held."""
    os.write(sys.__stderr__.fileno(), f"{message}\n".encode())

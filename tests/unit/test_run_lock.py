"""One job at a time trains into a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grn_scale.errors import UserError
from grn_scale.train.run_lock import FILE_NAME, run_lock

HOLD = """
import sys, time
from pathlib import Path
from grn_scale.train.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE,
                               env={**os.environ, "SLURM_JOB_ID": "4711"})
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_job_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "run", 60) as process:
        with pytest.raises(UserError, match=rf"in use by another job \(host .*, pid {process.pid}, slurm job 4711"):
            with run_lock(tmp_path / "run", patience=0.1):
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with run_lock(tmp_path / "run", patience=5):  # a killed job keeps nothing back
            assert (tmp_path / "run" / FILE_NAME).stat().st_size > 0


def test_a_job_waits_for_the_end_of_the_one_before_and_leaves_no_file(tmp_path: Path) -> None:
    with holder(tmp_path, 1.5) as process, run_lock(tmp_path, patience=30):
        assert process.wait(5) == 0
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path), pytest.raises(ZeroDivisionError):
        with run_lock(tmp_path / "other"):
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_of(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    begin = time.monotonic()
    with run_lock(tmp_path):
        assert "has no locks" in caplog.text and time.monotonic() - begin < 5

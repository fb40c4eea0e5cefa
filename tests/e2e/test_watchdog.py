"""Three processes of which one goes wrong: what the others do and say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jobs import ENVIRONMENT
from tests.helpers.rank_pool import free_port

End = tuple[Path, list[int], list[str]]
"""Run folder, exit codes and logs of the ranks."""


def run_jobs(folder: Path, *kinds: str) -> dict[str, End]:
    """Kind of fault -> how the job ended that had it. All jobs run at once: they mostly wait."""
    jobs = {}
    for kind in kinds:
        port = str(free_port())
        jobs[kind] = [subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.watched_ranks", kind, str(folder / kind)],
            stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            for rank in range(3)]
    found = {}
    for kind, processes in jobs.items():
        logs = [process.communicate(timeout=120)[1] for process in processes]
        found[kind] = folder / kind, [process.returncode for process in processes], logs
    return found


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, End]:
    return run_jobs(tmp_path_factory.mktemp("jobs"), "killed", "spent", "stuck")


def test_a_killed_rank_is_named_by_those_that_lost_contact(ends) -> None:
    _, codes, logs = ends["killed"]
    assert codes == [1, 1, -9], logs
    for log in logs[:2]:
        assert "rank 2 on" in log and "ended without a word in step of step 2" in log
        assert "Traceback" not in log


def test_the_exit_code_of_the_rank_that_failed_is_that_of_all(ends) -> None:
    _, codes, logs = ends["spent"]
    assert codes == [78, 78, 78], logs
    assert all("failed: the limit is spent" in log for log in logs[:2])
    assert "error: the limit is spent" in logs[2]


def test_a_hang_inside_a_step_names_who_does_not_wait_for_the_others(ends) -> None:
    folder, codes, logs = ends["stuck"]
    assert codes == [79, 79, 79], logs
    (message,) = [log for log in logs if "the run hangs" in log]
    assert "behind is rank 2 on" in message and "in go_wrong" not in message and "watched_ranks.py" in message
    assert "clip00 clip01" in message and "and 8 more" in message
    assert "the others wait: 2 in step of step 2" in message and "raise watchdog.step_seconds (3)" in message
    (hang,) = (folder / "hangs").iterdir()
    names = {path.name for path in hang.iterdir()}
    assert names == {"rank-00000.txt", "rank-00001.txt", "rank-00002.txt", "report.txt"}
    assert "in go_wrong" in (hang / "rank-00002.txt").read_text()
    assert "clip39" in (hang / "rank-00002.txt").read_text(), "the file has all samples"


@pytest.mark.slow
def test_a_rank_whose_interpreter_is_locked_is_missed_by_the_others_and_ends_by_itself(tmp_path) -> None:
    folder, codes, logs = run_jobs(tmp_path, "locked")["locked"]
    assert codes == [79, 79, 1], logs
    (message,) = [log for log in logs if "the run hangs" in log]
    assert "rank 2 gave no sign of life for 10 s" in message and "no answer from rank 2" in message
    assert "watched_ranks.py" in logs[2] and "go_wrong" in logs[2], "its last resort left the stacks on stderr"
    (hang,) = (folder / "hangs").iterdir()
    assert {path.name for path in hang.iterdir()} == {"rank-00000.txt", "rank-00001.txt", "report.txt"}

"""The worker processes of one task: what they say is passed on, and those that die are started again."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from grn_scale.data_pipeline.fleet import RESTARTS, _Child, _watch
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.data_pipeline.tokenize_clips import _command
from grn_scale.errors import DoNotRequeue, UserError
from grn_scale.storage import Storage

RECORD = ChunkRecord(3, "0" * 64, 0, (), {}, "", "", None, None)


@pytest.fixture
def records(tmp_path):
    return Records(Storage.of(tmp_path / "out"))


def children(*codes: str) -> list[_Child]:
    """Processes that run this code as workers 0, 1, ..."""
    return [_Child([sys.executable, "-c", f"import os, sys, time\n{code}"], f"here-{number}", number, 1)
            for number, code in enumerate(codes)]


def said(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_what_workers_that_end_well_have_said_is_passed_on_with_their_names(records, capsys):
    _watch(children("print('retried', file=sys.stderr)\nos.write(2, 'w\\u00f6rter\\n'.encode() + b'\\xff end')",
                    "print('not of the log')"), records)
    assert said(capsys) == ["here-0: retried", "here-0: wörter", "here-0: \N{REPLACEMENT CHARACTER} end"]


def test_what_a_worker_says_is_passed_on_while_it_works(records, tmp_path, capsys):
    child, = children(f"print('slow', file=sys.stderr, flush=True)\nwhile not os.path.exists({str(tmp_path / 'go')!r}):"
                      " time.sleep(0.01)")
    try:
        while not (err := capsys.readouterr().err):
            child.pass_on()
        assert err == "here-0: slow\n"
        (tmp_path / "go").touch()
        assert child.process.wait() == 0
        child.pass_on()
        assert not said(capsys)
    finally:
        child.process.kill()
        child.process.wait()


def test_a_worker_that_dies_is_started_again_and_its_last_words_are_told(records, tmp_path, capsys, caplog):
    died = tmp_path / "died"
    _watch(children(f"if not os.path.exists({str(died)!r}):\n open({str(died)!r}, 'w')\n raise ValueError('odd clip')"),
           records)
    assert "worker here-0 died with status 1 and is started again; it said last: ValueError: odd clip" in caplog.text
    assert said(capsys)[0] == "here-0: Traceback (most recent call last):"


def test_a_worker_that_is_killed_without_a_word_is_started_again(records, tmp_path, caplog):
    died = tmp_path / "died"
    _watch(children(f"if not os.path.exists({str(died)!r}):\n open({str(died)!r}, 'w')\n os.kill(os.getpid(), 9)"),
           records)
    assert "worker here-0 died with status -9 and is started again; it said nothing" in caplog.text


def test_a_worker_that_dies_again_and_again_ends_the_task_with_what_it_said(records, caplog):
    with pytest.raises(UserError, match=rf"(?s)here-0 died {RESTARTS + 1} times.*status 5:\nstale handle\ngone"):
        _watch(children("print('stale handle\\ngone', file=sys.stderr)\nsys.exit(5)"), records)
    assert caplog.text.count("started again; it said last: gone") == RESTARTS


def test_a_chunk_that_is_tried_again_counts_as_progress(records, tmp_path, monkeypatch):
    """Its record gives way to another one, so that there are never more of them."""
    count = tmp_path / "count"
    start = _Child.start

    def tried_again(child):
        records.write(replace(RECORD, retries=len(count.read_text()) if count.exists() else 0))
        start(child)

    monkeypatch.setattr(_Child, "start", tried_again)
    _watch(children(f"n = open({str(count)!r}, 'a')\nn.write('x')\nsys.exit(n.tell() <= {RESTARTS + 2})"), records)
    assert len(count.read_text()) == RESTARTS + 3 and len(records.all()) == 1


def test_what_is_finished_between_two_deaths_of_a_worker_counts_also_where_another_died_since(records):
    both = children("", "")
    for retries in range(RESTARTS + 2):
        records.write(replace(RECORD, retries=retries))
        assert [child.dies(records) for child in both] == [1, 1]
    assert [child.dies(records) for child in both] == [2, 2]
    for child in both:
        child.process.wait()


@pytest.mark.parametrize("rank", ["", "[rank 3] "])
def test_the_error_that_a_worker_ends_with_is_that_of_the_task(records, capsys, rank):
    with pytest.raises(DoNotRequeue, match="^too many bad lines$"):
        _watch(children(f"print('seen', file=sys.stderr)\nprint('{rank}error: too many bad lines', file=sys.stderr)\n"
                        "sys.exit(78)", "time.sleep(60)"), records)
    assert said(capsys) == ["here-0: seen"]


SLURM = ("ENVIRONMENT", "SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize(("environment", "name"), [
    ({"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7"}, "slurm-7"),
    ({"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, "slurm-9"),
    ({"ENVIRONMENT": "BATCH", "SLURM_JOB_ID": "9"}, "slurm-9"),
    ({"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "8"}, "slurm-9-2"),
    ({"SLURM_JOB_ID": "9"}, None),  # the shell of salloc
    ({"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),  # that of srun --pty
    ({}, None)])
def test_the_tasks_of_a_batch_job_are_one_command_and_those_of_a_shell_are_not(monkeypatch, environment, name):
    for variable in SLURM:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert (_command() == name) if name else (_command() != _command())
    assert os.sep not in _command()

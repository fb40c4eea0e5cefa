"""Workers of one tokenize job between them: claims that get lost, other jobs and environments, what is tried again."""

from __future__ import annotations

import json
import logging

import pytest

from grn_scale.command_line import run
from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import tokenize_clips, verify, worker
from grn_scale.data_pipeline.encode_videos import VideoShards
from grn_scale.errors import UserError
from tests.helpers.clips import write_clip
from tests.helpers.tokenize_setup import CLIPS, content, stamps


def test_the_tasks_of_an_array_try_again_once_what_failed(prepared, monkeypatch):
    def retry(**changes):
        arguments = prepared.arguments("array", prepared.lines[:3], **{"tokenize.max_bad_fraction": 1, **changes})
        return tokenize_clips.main([*arguments, "--retry-quarantined"])

    for task, changes in ((None, {"tokenize.decode_timeout_seconds": 0.001}),
                          ("7", {"tokenize.decode_timeout_seconds": 0.001}), ("7", {})):
        if task:
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", task)
        with pytest.raises(UserError, match="no line of .* gives a sample"):
            retry(**changes)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(tokenize_clips, "run_workers", _killed)
        retry()
    # What was asked for and not done is done by the next run, whatever it is.
    assert Dataset.open(prepared.run("array", prepared.lines[:3])).info.samples == 3


def _killed(*args):
    raise RuntimeError("killed")


def test_workers_of_another_job_stop_when_one_begins_in_their_folder(prepared, copied, monkeypatch):
    from grn_scale.data_pipeline import fleet

    real = fleet.work

    def overtaken(*args):
        (copied / "generation").write_text("another")
        real(*args)

    monkeypatch.setattr(fleet, "work", overtaken)
    write_clip(prepared.root / "clips/later.mp4", 12)
    with pytest.raises(UserError, match="another `grn-scale tokenize` with another manifest"):
        prepared.run(str(copied), [*prepared.lines, {"path": "clips/later.mp4", "caption": "later"}])


def test_a_worker_that_lost_its_claim_drops_its_work_and_goes_on(prepared, made, monkeypatch, caplog):
    """As one that sleeps longer than its lease, while another worker begins with its chunks and dies."""
    output, lost = prepared.root / "slept", []
    store = VideoShards._store

    def slept(*args):
        if not lost:
            for lease in sorted((output / "leases").glob("0*")):
                lost.append(lease.name)
                lease.write_text('{"owner": "another", "processes": "elsewhere"}')
        return store(*args)

    monkeypatch.setattr(VideoShards, "_store", slept)
    monkeypatch.setattr(logging.getLogger("grn_scale"), "propagate", True)
    monkeypatch.setattr(tokenize_clips, "start_logging", lambda: None)
    prepared.run("slept", **{"tokenize.lease_seconds": 0.5})
    assert lost and all(f"chunk {int(name)} is another worker's by now" in caplog.text for name in lost)
    assert content(output) == content(made)


def test_nothing_appears_of_a_chunk_that_was_encoded_while_another_job_began(prepared, monkeypatch):
    output = prepared.root / "late"
    store = VideoShards._store

    def overtaken(*args):
        (output / "generation").write_text("another")
        return store(*args)

    monkeypatch.setattr(VideoShards, "_store", overtaken)
    with pytest.raises(UserError, match="another `grn-scale tokenize`"):
        prepared.run("late", prepared.lines[:3])
    assert not list(output.glob("*.tar*")) and not list((output / "chunks").glob("*"))


def test_with_an_accepted_environment_finished_chunks_stay_and_the_rest_is_made(prepared, copied):
    job = json.loads((copied / "tokenize.json").read_text())
    job["environment"]["torch"] = "0.1"
    (copied / "tokenize.json").write_text(json.dumps(job))
    before = content(copied)
    write_clip(prepared.root / "clips/newer.mp4", 13)
    lines = [*prepared.lines, {"path": "clips/newer.mp4", "caption": "newer"}]
    with pytest.raises(UserError, match="torch 0.1 -> .*--accept-environment"):
        prepared.run(str(copied), lines)
    assert content(copied) == before
    tars = stamps(copied, "*.tar")
    assert tokenize_clips.main([*prepared.arguments(str(copied), lines), "--accept-environment"]) == 0
    assert Dataset.open(copied).info.samples == CLIPS + 1 and tars.items() <= stamps(copied, "*.tar").items()
    assert not list(verify.find_damage(copied))


def test_a_worker_with_another_environment_than_the_job_is_refused(prepared, monkeypatch):
    monkeypatch.setattr(worker, "environment", lambda settings, device: {"device": "cuda", "gpu": "another"})
    with pytest.raises(UserError, match="gpu .not known. -> another"):
        prepared.run("mixed", prepared.lines[:3])
    assert not list((prepared.root / "mixed").glob("*.tar"))


def test_a_worker_that_dies_of_its_storage_says_so_and_may_be_started_again(prepared, capsys):
    arguments = [argument for argument in prepared.arguments("unused") if not argument.startswith("output=")]
    assert run(worker.main, [*arguments, "output=/proc/nope", "--name", "w"]) == 1
    error = capsys.readouterr().err
    # With "error:" in front the fleet would take it for a fault that no restart mends.
    assert "/proc/nope/tokenize.json" in "".join(error.split()) and "error:" not in error


@pytest.mark.parametrize("output, code", [("/proc/nope", 1), ("nope://bucket/tokens", 2)])
def test_an_output_that_cannot_be_written_is_one_message_that_names_it(prepared, capsys, output, code):
    arguments = [argument for argument in prepared.arguments("unused") if not argument.startswith("output=")]
    assert run(tokenize_clips.main, [*arguments, f"output={output}"]) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {output}") and "correct the" in error

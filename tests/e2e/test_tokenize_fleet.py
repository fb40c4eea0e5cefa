"""Workers of one tokenize job between them: claims that get lost, other jobs and environments, what is tried again."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from grn_scale.command_line import run
from grn_scale.data.dataset import Dataset
from grn_scale.data_pipeline import finish, tokenize_clips, verify, worker
from grn_scale.data_pipeline.encode_videos import VideoShards
from grn_scale.data_pipeline.index_build import run_build
from grn_scale.errors import UserError
from grn_scale.leases import Leases
from tests.helpers.clips import write_clip
from tests.helpers.tokenize_setup import CLIPS, content, stamps

HALF = {"tokenize.max_bad_fraction": 0.5}


def test_the_tasks_of_an_array_try_again_once_what_failed(prepared, monkeypatch, capsys):
    def retry(**changes):
        arguments = prepared.arguments("array", prepared.lines[:3], **{"tokenize.max_bad_fraction": 1, **changes})
        return tokenize_clips.main([*arguments, "--retry-quarantined"])

    for task, changes in ((None, {"tokenize.decode_timeout_seconds": 0.001}),
                          ("7", {"tokenize.decode_timeout_seconds": 0.001}), ("7", {})):
        if task:
            monkeypatch.setenv("SLURM_ARRAY_JOB_ID", task)
        with pytest.raises(UserError, match="no line of .* gives a sample"):
            retry(**changes)
        left = "3 clips that failed to decode are not tried again: slurm-7 has asked for that before"
        assert (left in capsys.readouterr().err) == (task is not None and not changes)
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
    """As one that sleeps longer than its lease, while another worker takes its chunks and gives them back."""
    output, lost = prepared.root / "slept", []
    store = VideoShards._store

    def slept(*args):
        if not lost:
            for lease in sorted((output / "leases").glob("0*")):
                lost.append(lease.name)
                lease.unlink()
        return store(*args)

    monkeypatch.setattr(VideoShards, "_store", slept)
    monkeypatch.setattr(logging.getLogger("grn_scale"), "propagate", True)
    monkeypatch.setattr(tokenize_clips, "start_logging", lambda: None)
    prepared.run("slept")
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


def test_what_is_published_while_a_chunk_is_made_again_stays_as_it_is(prepared, monkeypatch):
    """One command tries again what failed, while another publishes what there is."""
    write_clip(prepared.root / "clips/broken.mp4", 14)
    whole = (prepared.root / "clips/broken.mp4").read_bytes()
    (prepared.root / "clips/broken.mp4").write_bytes(whole[:700])
    lines = [*prepared.lines[:2], {"path": "clips/broken.mp4", "caption": "broken"}]
    output, arguments = prepared.root / "meanwhile", prepared.arguments("meanwhile", lines, **HALF)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="killed"):
        patched.setattr(tokenize_clips, "finish_once", _killed)
        tokenize_clips.main(arguments)
    (prepared.root / "clips/broken.mp4").write_bytes(whole)
    store, published = VideoShards._store, []

    def meanwhile(*args):
        if not published:
            assert run_build([str(output)]) == 0
            published.append((Dataset.open(output).snapshot, stamps(output, "*.tar")))
        return store(*args)

    monkeypatch.setattr(VideoShards, "_store", meanwhile)
    assert tokenize_clips.main([*arguments, "--retry-quarantined"]) == 0
    ((snapshot, tars),) = published
    assert tars.items() <= stamps(output, "*.tar").items()
    assert Dataset.open(output).info.samples == 3 and Dataset.open(output, snapshot).info.samples == 2
    assert not list(verify.find_damage(output))


@pytest.mark.parametrize("left", ["finished.json", "nothing"])
def test_a_tar_that_is_lost_is_made_again_also_where_a_dead_task_kept_the_status(prepared, copied, left):
    before = content(copied)
    (copied / "video-000001.tar").unlink()
    if left == "nothing":
        (copied / "finished.json").unlink()
    (copied / "leases/status").write_text('{"owner": "another", "processes": "elsewhere"}')
    prepared.run(str(copied))
    (copied / "leases/status").unlink()
    after = content(copied)
    assert after.pop("video-000001.tar") == before.pop("video-000001.tar")
    assert Dataset.open(copied).info.samples == CLIPS and not list(verify.find_damage(copied))


def test_a_chunk_that_another_finished_since_the_last_look_is_not_made_again(prepared, made, monkeypatch, capsys):
    output, claim = prepared.root / "stale", Leases.claim

    def late(leases, name):
        if name.isdigit() and not list(output.glob("*.tar")):
            for folder in ("index", "chunks", "sources"):
                shutil.copytree(made / folder, output / folder, dirs_exist_ok=True)
            for tar in made.glob("*.tar"):
                shutil.copy(tar, output)
        return claim(leases, name)

    monkeypatch.setattr(Leases, "claim", late)
    assert tokenize_clips.main([*prepared.arguments("stale"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clips"] == 0 and stamps(output, "*.tar").keys() == stamps(
        made, "*.tar").keys()


def test_who_lost_the_claim_while_it_put_the_dataset_together_publishes_nothing(prepared, made, monkeypatch, caplog):
    output, write, at = prepared.root / "dozed", finish.without_repeats, []

    def slept(*args):
        at.append((output / "dataset.json").exists())
        if len(at) == 1:
            (output / "leases/finish").unlink()  # as another leaves it that has taken the claim over and is done
        return write(*args)

    monkeypatch.setattr(finish, "without_repeats", slept)
    monkeypatch.setattr(logging.getLogger("grn_scale"), "propagate", True)
    monkeypatch.setattr(tokenize_clips, "start_logging", lambda: None)
    prepared.run("dozed")
    assert at == [False, False] and "another process puts the dataset together" in caplog.text
    assert content(output) == content(made)


def test_a_job_that_was_taken_over_while_it_put_the_dataset_together_publishes_nothing(prepared, copied, monkeypatch):
    before, write = content(copied), finish.without_repeats

    def overtaken(*args):
        (copied / "generation").write_text("another")
        return write(*args)

    monkeypatch.setattr(finish, "without_repeats", overtaken)
    lines = [*prepared.lines[:7], {**prepared.lines[7], "caption": "another caption"}]
    with pytest.raises(UserError, match="another `grn-scale tokenize`"):
        prepared.run(str(copied), lines)
    assert (copied / "dataset.json").read_bytes() == before["dataset.json"]
    assert not (copied / "finished.json").exists()


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

"""Checkpoints in one process: round trips, damage, kills at every step of a save, pruning, resume."""

import json
import logging
import os
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from grn_scale.checkpoint import checkpoint, layout, load_model_config, load_weights
from grn_scale.checkpoint.checkpoint import load_checkpoint, resolve_resume, save_checkpoint
from grn_scale.checkpoint.chunks import Chunk
from grn_scale.config.load import to_dict
from grn_scale.config.schema import ModelConfig
from grn_scale.errors import ConfigError, UserError
from tests.helpers.checkpoints import chunks, empty_like, in_child, no_pickle_in, same, weights


def save(run, step, keep_last=9, doubtful=False, **sections):
    return save_checkpoint(run, step, {name: chunks(t) for name, t in (sections or {"model": weights(step)}).items()},
                           {"step": step, "lr": 0.1}, keep_last=keep_last, doubtful=doubtful)


# --- whole checkpoints

def test_a_checkpoint_comes_back_with_its_sections_and_state(tmp_path):
    path = save(tmp_path, 3, model=weights(), optimizer=weights(1), ema=weights(2))
    assert path == tmp_path / "step-00000003"
    back = {"model": empty_like(weights()), "optimizer": empty_like(weights()), "ema": empty_like(weights())}
    state = load_checkpoint(path, {name: chunks(t) for name, t in back.items()})
    assert state == {"step": 3, "lr": 0.1}
    assert same(back["model"], weights()) and same(back["optimizer"], weights(1)) and same(back["ema"], weights(2))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_section_that_is_not_there_fails_and_one_not_asked_for_is_logged(tmp_path, caplog):
    path = save(tmp_path, 1, model=weights(), ema=weights(1))
    with pytest.raises(UserError, match="holds no optimizer"):
        load_checkpoint(path, {"model": chunks(weights()), "optimizer": []})
    with caplog.at_level(logging.WARNING):
        load_checkpoint(path, {"model": chunks(empty_like(weights()))})
    assert "ema is in the checkpoint, but not restored" in caplog.text


def test_weights_load_from_step_folder_run_folder_and_file(tmp_path):
    save(tmp_path / "run", 1)
    path = save(tmp_path / "run", 2, model=weights(2), optimizer=weights(), ema=weights(5))
    assert same(load_weights(path), weights(2))
    assert same(load_weights(str(tmp_path / "run")), weights(2))
    assert same(load_weights(tmp_path / "run", ema=True), weights(5))
    save_file(weights(9), tmp_path / "w.safetensors")
    assert same(load_weights(tmp_path / "w.safetensors"), weights(9))


def test_weights_that_are_not_there_are_refused_with_the_reason(tmp_path):
    path = save(tmp_path / "run", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    for place, ema, message in ((path, True, "no moving average"), (tmp_path / "empty", False, "no weights at"),
                                (tmp_path / "absent", False, "no weights at"),
                                (tmp_path / "bad.safetensors", False, "as safetensors"),
                                (tmp_path / "bad.safetensors", True, "one set of weights")):
        with pytest.raises(UserError, match=message):
            load_weights(place, ema=ema)


def test_the_model_configuration_comes_back_from_the_state(tmp_path):
    model = ModelConfig()
    state = {"config": {"model": to_dict(model)}}
    save_checkpoint(tmp_path / "run", 1, {"model": chunks(weights())}, state, keep_last=1)
    assert load_model_config(tmp_path / "run") == model
    with pytest.raises(UserError, match="no model configuration"):
        load_model_config(save(tmp_path / "other", 1))
    with pytest.raises(UserError, match="give a checkpoint folder"):
        load_model_config(tmp_path / "run" / "step-00000001" / "state.json")


def test_no_file_of_a_checkpoint_is_a_pickle_or_an_archive(tmp_path):
    path = save(tmp_path, 1, model=weights(), optimizer=weights())
    assert {file.name for file in path.rglob("*") if file.is_file()} == {
        "COMPLETE", "metadata.json", "state.json", "rank-00000.safetensors"}
    no_pickle_in(path)


def test_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    for state in ({"x": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(tmp_path, 1, {"model": chunks(weights())}, state, keep_last=1)
    with pytest.raises(ValueError, match="section '../x'"):
        save_checkpoint(tmp_path, 1, {"../x": chunks(weights())}, {}, keep_last=1)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing_half_written(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="no rank gave"):
        save_checkpoint(tmp_path, 2, {"ema": chunks(weights()), "model": [Chunk("w", (3,), (0,), torch.zeros(2))]}, {},
                        keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_complete_checkpoint_is_never_overwritten_and_a_damaged_one_gives_way(tmp_path, caplog):
    path = save(tmp_path, 1)
    with pytest.raises(UserError, match="complete checkpoint already"):
        save(tmp_path, 1)
    (path / "state.json").write_text("{}")
    assert same(load_weights(save(tmp_path, 1, model=weights(4))), weights(4))
    assert "replacing the damaged checkpoint" in caplog.text


def test_a_save_of_which_another_job_removed_files_is_not_sealed(tmp_path, monkeypatch):
    def seal(partial, *arguments):
        shutil.rmtree(partial / "ema")
        return real(partial, *arguments)

    real = checkpoint.seal
    monkeypatch.setattr(checkpoint, "seal", seal)
    with pytest.raises(UserError, match="ema/metadata.json is gone.*does another job save"):
        save(tmp_path, 1, model=weights(), ema=weights())
    assert list(tmp_path.iterdir()) == []


# --- damage

def damage_truncate(path):
    os.truncate(path / "optimizer" / "rank-00000.safetensors", 100)


def damage_bit(path):
    file = path / "optimizer" / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def damage_state(path):
    (path / "state.json").write_text('{"step": 999}')


def damage_index(path):
    (path / "model" / "metadata.json").unlink()


def damage_marker(path):
    (path / "COMPLETE").unlink()


def damage_marker_depth(path):
    (path / "COMPLETE").write_text("[" * 100_000)


def damage_sections(path):
    seal = json.loads((path / "COMPLETE").read_text())
    del seal["sha256"]["optimizer/metadata.json"]
    (path / "COMPLETE").write_text(json.dumps(seal))


def damage_marker_content(path):
    (path / "COMPLETE").write_text('{"format_version": 1, "sha256": {"../x": ""}}')


@pytest.mark.parametrize("damage, reason", [
    (damage_truncate, "has 100 bytes instead of"), (damage_bit, "checksum differs"), (damage_state, "checksum differs"),
    (damage_index, "model/metadata.json is missing"), (damage_marker, "no completion marker"),
    (damage_marker_depth, "cannot read .*COMPLETE"), (damage_sections, "seals other sections"),
    (damage_marker_content, "metadata.json is missing|checksum differs|no file of a checkpoint")],
    ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_checkpoint_is_skipped_with_its_reason_for_the_one_before(tmp_path, caplog, damage, reason):
    older = save(tmp_path, 1, model=weights(), optimizer=weights())
    newer = save(tmp_path, 2, model=weights(), optimizer=weights())
    assert layout.newest_complete(tmp_path) == newer
    damage(newer)
    with pytest.raises(UserError, match=reason):
        layout.verify(newer)
    with caplog.at_level(logging.WARNING):
        assert resolve_resume("auto", tmp_path) == older
    assert f"skipped checkpoint {newer}" in caplog.text


def test_damaged_weights_are_not_loaded(tmp_path):
    path = save(tmp_path, 1, model=weights(), optimizer=weights())
    damage_bit(path)
    load_weights(path)  # the damage is in the optimizer, which is not read
    file = path / "model" / "rank-00000.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="checksum differs"):
        load_weights(path)
    with pytest.raises(UserError, match="cannot read"):
        load_checkpoint(path, {"model": chunks(weights())})


# --- kills

def kill_at(event_number, folder):
    """Kill this process at the n-th time it is about to touch something in `folder`."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(args[0]):
            seen += 1
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_at_any_moment_of_saving_and_pruning_leaves_the_newest_complete_one_loadable(tmp_path):
    outcomes = []
    save(tmp_path / "start", 1)
    for moment in range(1, 500):
        run = shutil.copytree(tmp_path / "start", tmp_path / f"run-{moment}")

        def killed_save():
            kill_at(moment, run)
            save(run, 2, keep_last=1)

        status = in_child(killed_save)
        newest = layout.newest_complete(run)
        assert newest is not None, f"killed at {moment}"
        step = int(newest.name.removeprefix("step-"))
        assert same(load_weights(newest), weights(step))
        outcomes.append(step)

        assert resolve_resume("must", run) == newest
        save(run, 3, keep_last=1)
        left = {p.name for p in run.iterdir()}
        assert left == {"step-00000003"}, f"killed at {moment}: left {left}"
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert {1, 2} == set(outcomes) and outcomes == sorted(outcomes) and len(outcomes) > 30


def test_a_kill_before_the_first_checkpoint_lets_auto_start_afresh_but_not_must_or_none(tmp_path):
    def killed_save():
        kill_at(12, tmp_path)
        save(tmp_path, 1)

    assert os.WIFSIGNALED(in_child(killed_save))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.partial"]
    assert resolve_resume("auto", tmp_path) is None
    with pytest.raises(UserError, match="no checkpoint in"):
        resolve_resume("must", tmp_path)
    with pytest.raises(ConfigError, match="was used before"):
        resolve_resume("none", tmp_path)


def test_a_full_disk_fails_with_one_message_and_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)

    def limited_save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        try:
            save(tmp_path, 2, model={"large": torch.zeros(1 << 16)})
        except UserError as error:
            os._exit(3 if "cannot write" in str(error) and "free space" in str(error) else 4)

    assert os.waitstatus_to_exitcode(in_child(limited_save)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


# --- pruning

def test_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    with pytest.raises(ValueError, match="keep_last"):
        layout.surplus(tmp_path, 0)


def test_pruning_keeps_the_newest_that_verifies_and_whatever_is_not_ours(tmp_path):
    paths = [save(tmp_path, step, model=weights(), optimizer=weights()) for step in (1, 2, 3, 4)]
    damage_bit(paths[3])  # not visible without reading the file
    damage_marker(paths[0])
    (paths[1] / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    going = layout.surplus(tmp_path, 1)
    assert going == [paths[2], paths[1]]
    assert layout.newest_complete(tmp_path) == paths[2]
    assert layout.prune(going, paths[2]) == []
    (paths[1] / "notes.txt").unlink()
    assert layout.prune(going, paths[2]) == [paths[1]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000001", "step-00000003", "step-00000004", "step-by-step"]


def test_checkpoints_in_doubt_are_set_aside_once_and_nothing_resumes_from_them(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert layout.newest_complete(tmp_path, before=2) == layout.step_folder(tmp_path, 1)
    assert layout.newest_complete(tmp_path, before=1) is None
    assert [path.name for path in layout.set_aside(tmp_path, 3)] == ["step-00000003.doubtful"]
    assert resolve_resume("auto", tmp_path) == layout.step_folder(tmp_path, 2)
    save(tmp_path, 3, model=weights(9))
    assert [path.name for path in layout.set_aside(tmp_path, 2)] == [
        "step-00000002.doubtful", "step-00000003.doubtful"], "in place of the one before"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000001", "step-00000002.doubtful", "step-00000003.doubtful"]
    assert same(load_weights(tmp_path / "step-00000003.doubtful"), weights(9))


def test_a_checkpoint_saved_in_doubt_removes_no_other_and_nothing_resumes_from_it(tmp_path):
    good = [save(tmp_path, step, keep_last=2) for step in (1, 2)]
    for fill in (3, 4):
        path = save(tmp_path, 3, model=weights(fill), keep_last=1, doubtful=True)
    assert path.name == "step-00000003.doubtful" and same(load_weights(path), weights(4))
    assert resolve_resume("auto", tmp_path) == good[1] and good[0].exists()
    path.rename(tmp_path / "step-00000003.doubtful.partial")  # killed while it was written
    assert save(tmp_path, 3, keep_last=2).name == "step-00000003"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_save_reads_each_checkpoint_that_is_there_once(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=3)
    read_json, read = layout.read_json, []
    monkeypatch.setattr(layout, "read_json", lambda path: [read.append(path), read_json(path)][1])
    save(tmp_path, 4, keep_last=3)
    assert sorted(path.parent.name for path in read if path.name == "COMPLETE" and path.parent.name[-1] < "4") == [
        "step-00000001", "step-00000002", "step-00000003"]
    assert not (tmp_path / "step-00000001").exists()


def test_a_folder_with_files_of_others_is_never_deleted_by_a_save(tmp_path):
    partial = tmp_path / "step-00000005.partial"
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "thesis.txt").write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "step-00000006.partial").symlink_to(outside)
    save(tmp_path, 1)
    assert (partial / "model" / "thesis.txt").exists() and outside.is_dir()
    with pytest.raises(UserError, match="in the way"):
        save(tmp_path, 5)


# --- resume

def test_none_starts_in_a_new_folder_and_refuses_a_used_one(tmp_path):
    assert resolve_resume("none", tmp_path / "new") is None
    (tmp_path / "run").mkdir()
    assert resolve_resume("none", tmp_path / "run") is None
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="used before .*metrics.jsonl"):
        resolve_resume("none", tmp_path / "run")


def test_auto_and_must_take_the_newest_and_must_needs_one(tmp_path):
    assert resolve_resume("auto", tmp_path) is None
    with pytest.raises(UserError, match="no checkpoint in"):
        resolve_resume("must", tmp_path)
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert resolve_resume("auto", tmp_path) == resolve_resume("must", tmp_path) == newest


def test_auto_does_not_start_afresh_over_damaged_checkpoints(tmp_path):
    path = save(tmp_path, 1, model=weights(), optimizer=weights())
    damage_bit(path)
    with pytest.raises(UserError, match="(?s)step-00000001: its contents do not match"):
        resolve_resume("auto", tmp_path)


def test_a_path_may_be_a_step_folder_or_a_run_folder_and_must_not_fork_a_history(tmp_path):
    old = save(tmp_path / "old", 1)
    new = save(tmp_path / "old", 2)
    assert resolve_resume(str(old), tmp_path / "run") == old
    assert resolve_resume(str(tmp_path / "old"), tmp_path / "run") == new
    assert resolve_resume(str(new), tmp_path / "old") == new
    with pytest.raises(ConfigError, match="step-00000002, which is newer"):
        resolve_resume(str(old), tmp_path / "old")
    save(tmp_path / "run", 1)
    with pytest.raises(ConfigError, match="used before"):
        resolve_resume(str(old), tmp_path / "run")
    (tmp_path / "a.txt").touch()
    layout.partial_folder(old).mkdir()
    for mode, reason in ((tmp_path / "nowhere", "no such folder"), (tmp_path / "a.txt", "is a file"),
                         (layout.partial_folder(old), "has not ended"), ("", "is empty")):
        with pytest.raises(ConfigError, match=reason):
            resolve_resume(str(mode), tmp_path / "run2")
    copy = new.rename(tmp_path / "best")
    assert resolve_resume(str(copy), tmp_path / "run2") == copy
    assert same(load_weights(copy), weights(2))
    damage_marker(old)
    with pytest.raises(UserError, match="no completion marker"):
        resolve_resume(str(old), tmp_path / "run2")

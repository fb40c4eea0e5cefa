"""What the preflight says of one node: its devices, space, dataset and checkpoints."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.load import load_config
from grn_scale.slurm import preflight_devices
from grn_scale.slurm.preflight_check import Failed, Limit, Node, Skipped, judge
from grn_scale.slurm.preflight_devices import check_devices, driver_version, memory_errors
from grn_scale.slurm.preflight_files import Files, checkpoint_bytes
from grn_scale.slurm.preflight_network import Network
from tests.helpers.checkpoints import chunks, weights
from tests.helpers.dataset import flip_byte, make_dataset
from tests.helpers.preflight import NAMES, named, states, write_settings

# -- devices -------------------------------------------------------------------------------------------------------


def fake_smi(tmp_path, monkeypatch, script):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_devices_are_skipped_where_there_is_nothing_of_nvidia(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_devices, "DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skipped, match="torch is a CPU build"):
        check_devices(2)
    with pytest.raises(Skipped, match="no GPUs are asked for"):
        check_devices(0)


def test_a_driver_without_a_torch_for_it_and_a_torch_without_devices_fail(monkeypatch, tmp_path):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build  (user)\n")
    monkeypatch.setattr(preflight_devices, "DRIVER_FILE", driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Failed, match="CPU build, but the node has NVIDIA driver 550.54.14"):
        check_devices(2)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(Failed, match="1000 devices are asked for, torch"):
        check_devices(1000)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.07  Sat Feb 17\n")
    assert driver_version() == "535.161.07"


def test_memory_errors_are_those_of_our_devices_and_a_hanging_tool_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_devices, "DRIVER_FILE", tmp_path / "none")
    fake_smi(tmp_path, monkeypatch, 'case "$1" in *driver*) echo 550.1 ;; *ecc*) echo "GPU-a, 3"; echo "GPU-b, [N/A]"; '
             'echo "GPU-c, 9" ;; *) echo "GPU-a, 0"; echo "GPU-b, 1" ;; esac')
    assert driver_version() == "550.1"
    lost, odd, unknown = memory_errors({"a", "b"})
    assert [line.split()[0] for line in lost] == ["GPU-b"] and not unknown
    assert len(odd) == 1 and odd[0].startswith("GPU-a has 3 uncorrectable memory errors")
    fake_smi(tmp_path, monkeypatch, "exit 9")
    assert memory_errors({"a"}) == (
        [], [], "; memory errors not looked at: nvidia-smi says nothing about these devices")
    monkeypatch.setattr(preflight_devices, "SMI_SECONDS", 0.2)
    fake_smi(tmp_path, monkeypatch, "exec sleep 20")
    with pytest.raises(Failed, match="did not answer"):
        memory_errors({"a"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_answer_and_copy(tmp_path):
    node = Network(Node(0, ("a",)), "", Limit(60), tmp_path, gpus=torch.cuda.device_count())
    results = [judge(*check) for check in node.checks()]
    assert states(results)["devices"] == states(results)["bandwidth"] == "ok", results
    assert named(results, "bandwidth").measured["copy_gigabytes_per_second"] > 1


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path):
    make_dataset(tmp_path / "tokens")
    return write_settings(tmp_path)


def look(config, number=0):
    return [judge(*check) for check in Files(config, Node(number, NAMES)).checks()]


def test_a_node_that_reads_and_writes_all_passes_and_leaves_nothing(settings, tmp_path):
    for number, shard in ((0, "video-000000"), (1, "video-000001"), (2, "video-000000")):
        results = look(settings, number)
        assert set(states(results).values()) == {"ok"}, results
        assert shard in named(results, "dataset").detail
    assert list((tmp_path / "run").iterdir()) == []
    assert "for 3 more checkpoints" in named(results, "disk").detail


def test_a_full_run_folder_fails_before_the_first_save(settings, tmp_path, monkeypatch):
    needed = 3 * checkpoint_bytes(load_config(settings))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed - 1))
    assert states(look(settings))["disk"] == "failed" and "train.keep_last" in named(look(settings), "disk").remedy
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=needed))
    assert states(look(settings))["disk"] == "ok" and states(look(settings))["temporary"] == "failed"


def test_a_checkpoint_is_as_large_as_its_parameters_say(tmp_path):
    from grn_scale.class_to_image import build_model as build_class_model
    from grn_scale.model import build_model

    config = load_config(write_settings(tmp_path))
    count = sum(p.numel() for p in build_model(config.model).parameters())
    assert checkpoint_bytes(config) == 16 * count
    plain = load_config(write_settings(tmp_path), ["optimizer.name=sgd", "optimizer.ema_decay=0"])
    assert checkpoint_bytes(plain) == 4 * count
    small = load_config(None, ["model.hidden_size=32", "model.num_layers=2", "model.num_heads=2",
                               "model.in_context_start=1"], cls=ClassConfig)
    assert checkpoint_bytes(small) == 16 * sum(p.numel() for p in build_class_model(small.model).parameters())


def test_datasets_that_cannot_be_read_are_named(settings, tmp_path):
    shard = tmp_path / "tokens/video-000001.tar"
    flip_byte(shard, 512)
    damaged = named(look(settings, 1), "dataset")
    assert damaged.state == "failed" and "video-000001.tar" in damaged.detail
    assert states(look(settings, 0))["dataset"] == "ok"
    shard.unlink()
    gone = named(look(settings, 1), "dataset")
    assert "video-000001.tar cannot be read: No such file" in gone.detail and "mounted" in gone.remedy
    shutil.move(tmp_path / "tokens", tmp_path / "elsewhere")
    assert "is no tokenized dataset" in named(look(settings), "dataset").detail


def test_folders_that_cannot_be_written_to_fail(settings, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("a file")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    results = look(settings)
    assert states(results)["disk"] == states(results)["temporary"] == "failed"
    assert str(tmp_path / "run") in named(results, "disk").detail and "scratch" in named(results, "temporary").remedy


def test_a_configuration_that_cannot_be_read_leaves_the_temporary_folder_to_look_at(tmp_path):
    results = look(tmp_path / "config.yaml")
    assert states(results) == {"settings": "failed", "disk": "skipped", "temporary": "ok", "dataset": "skipped",
                               "checkpoint": "skipped"}


def test_only_training_needs_room_for_checkpoints(settings, tmp_path):
    (tmp_path / "submission.json").write_text(json.dumps({"kind": "tokenize"}))
    settings.write_text(f"output: {tmp_path}/run\n")
    results = look(settings)
    assert states(results) == {"settings": "ok", "disk": "ok", "temporary": "ok", "dataset": "skipped",
                               "checkpoint": "skipped"}
    assert named(results, "disk").detail.endswith("needed are 1.0 GiB")
    settings.write_text("output: memory://bucket/tokens\n")
    assert states(look(settings))["disk"] == "skipped"


def test_the_checkpoint_to_go_on_from_is_looked_at(settings, tmp_path):
    assert named(look(settings), "checkpoint").detail == "the run begins"
    save_checkpoint(tmp_path / "run", 7, {"model": chunks(weights())}, {"config": {"model": {}}}, keep_last=2)
    results = look(settings)
    assert named(results, "checkpoint").detail.endswith("goes on from " + str(tmp_path / "run/step-00000007"))
    assert "for 2 more checkpoints" in named(results, "disk").detail
    (tmp_path / "run/step-00000007/state.json").unlink()
    damaged = named(look(settings), "checkpoint")
    assert damaged.state == "failed" and "step-00000007" in damaged.detail
    shutil.rmtree(tmp_path / "run")
    nowhere = named(look(write_settings(tmp_path, f"init: {{from: {tmp_path}/none}}\n")), "checkpoint")
    assert nowhere.state == "failed" and f"{tmp_path}/none" in nowhere.detail

"""The record of a run: one row a step, the newest attempt counts, nothing half-written is read."""

import importlib.util
import json
import math

import pytest

from grn_scale.config.schema import LoggingConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.train.metrics import MetricsLog, plot_metrics, read_metrics

OFF = LoggingConfig()


def record(folder, start, steps, loss):
    with MetricsLog(folder, start, OFF) as log:
        for step in steps:
            log.write(step, {"loss": loss})
    return log


def test_rows_carry_run_attempt_and_step_and_are_on_disk_at_once(tmp_path):
    log = MetricsLog(tmp_path, 0, OFF)
    log.write(1, {"loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    log.close()
    assert rows[0]["event"] == "start" and rows[0]["step"] == 0
    assert {key: rows[1][key] for key in ("run", "attempt", "step", "loss")} == {
        "run": log.run_id, "attempt": 1, "step": 1, "loss": 0.5}


def test_resumed_attempt_supersedes_later_steps_of_earlier_ones_even_before_it_reaches_them(tmp_path):
    first = record(tmp_path, 0, range(1, 11), 1.0)
    second = record(tmp_path, 6, range(7, 9), 2.0)
    assert (second.run_id, second.attempt) == (first.run_id, 2)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["attempt"], row["loss"]) for row in rows] == [
        *((step, 1, 1.0) for step in range(1, 7)), (7, 2, 2.0), (8, 2, 2.0)]


def test_rows_of_one_step_come_back_as_one(tmp_path):
    with MetricsLog(tmp_path, 0, OFF) as log:
        log.write(1, {"loss": 1.0})
        log.write(1, {"validation_loss": 2.0})
    (row,) = read_metrics(log.path)
    assert (row["loss"], row["validation_loss"]) == (1.0, 2.0)


def test_line_cut_off_by_a_kill_is_not_read_and_not_built_upon(tmp_path):
    path = record(tmp_path, 0, [1, 2], 1.0).path
    with path.open("a") as file:
        file.write('{"run": "x", "st')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    record(tmp_path, 2, [3], 1.0)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_damaged_line_in_the_middle_is_named(tmp_path):
    path = record(tmp_path, 0, [1], 1.0).path
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics.jsonl:1: no JSON object"):
        read_metrics(path)
    with pytest.raises(UserError, match="no metrics at"):
        read_metrics(tmp_path / "elsewhere.jsonl")


def test_values_that_json_cannot_hold_become_null(tmp_path):
    with MetricsLog(tmp_path, 0, OFF) as log:
        log.write(1, {"loss": math.nan, "bins": [1.0, math.inf, None]})
    (row,) = read_metrics(log.path)
    assert row["loss"] is None and row["bins"] == [1.0, None, None]


def test_rank_that_does_not_write_leaves_no_file(tmp_path):
    with MetricsLog(tmp_path, 0, OFF, writes=False) as log:
        log.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_asked_for_and_not_installed_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="logging.wandb is 'offline', but wandb is not installed"):
        MetricsLog(tmp_path, 0, LoggingConfig(wandb="offline"))
    assert list(tmp_path.iterdir()) == []


def test_offline_wandb_run_gets_the_rows_and_keeps_its_id_over_attempts(tmp_path):
    pytest.importorskip("wandb")
    settings = LoggingConfig(wandb="offline")
    for attempt, start in ((1, 0), (2, 1)):
        with MetricsLog(tmp_path, start, settings, config={"seed": 1}) as log:
            log.write(start + 1, {"loss": 1.0, "loss_by_noise": [0.5, None]})
        assert log.attempt == attempt
    folders = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(name.endswith(log.run_id) for name in folders)


def test_plot_is_a_png_in_the_run_folder(tmp_path):
    with MetricsLog(tmp_path, 0, OFF) as log:
        for step in range(1, 120):
            log.write(step, {"loss": 1 / step, "loss_by_noise": [1 / step, None], "bit_accuracy_by_noise": [0.5, None]})
        log.write(119, {"validation_loss": 0.1})
    path = plot_metrics(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.parent == tmp_path

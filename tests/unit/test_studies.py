"""Scaling studies: the matrix that follows from a file, and what is made of the runs' records."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError, UserError
from grn_scale.studies.report import write_report
from grn_scale.studies.results import measure, read_results, summarize, write_results
from grn_scale.studies.study import generate, read_study, read_study_file
from grn_scale.tools import scaling

SMALL = {"model.hidden_size": 32, "model.num_layers": 4, "model.num_heads": 4, "model.ffn_hidden_size": 64,
         "data.packs_per_step": 4, "data.token_budget": 128}


def study_file(folder: Path, **keys: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"set": SMALL, "processes": [1, 2], "repeats": 2, "warmup_steps": 2,
                                    "measured_steps": 9, **keys}))
    return path


def step(number: int, **values: float) -> dict[str, float]:
    return {"step": number, "step_seconds": 2.0, "data_wait_seconds": 0.0, "tokens": 100, "tokens_per_second": 50.0,
            **values}


def cell(series: str, processes: int, repeat: int, rate: float) -> dict[str, object]:
    row = measure([step(number, tokens=rate * 2, tokens_per_second=rate) for number in range(1, 12)], 2)
    return {"cell": f"{series}-p{processes}-r{repeat}", "series": series, "processes": processes, "repeat": repeat,
            "state": "measured", "reason": "", "nodes": "node1", "torch": "2", "commit": "abc", **row}


def test_every_legal_combination_is_a_cell_and_the_others_keep_their_reason(tmp_path: Path) -> None:
    file = read_study_file(study_file(tmp_path, layouts={"dp": None, "tp": {"parallel.tensor": 2}},
                                      axes={"data.token_budget": [128, 256]}, mode="weak"))
    study = generate(file, tmp_path / "study")
    assert {(made.series, made.processes) for made in study.cells} == {
        ("dp-token_budget128", 1), ("dp-token_budget128", 2), ("dp-token_budget256", 1), ("dp-token_budget256", 2),
        ("tp-token_budget128", 2), ("tp-token_budget256", 2)}
    assert len(study.cells) == 12 and [each["processes"] for each in study.illegal] == [1, 1]
    assert "parallel.tensor" in study.illegal[0]["reason"]
    config = load_config(study.folder / "cells/dp-token_budget256-p2-r1/config.yaml", [])
    assert (config.data.packs_per_step, config.data.token_budget, config.train.steps) == (8, 256, 11)
    assert read_study(tmp_path / "study") == study
    with pytest.raises(UserError, match="is not empty"):
        generate(file, tmp_path / "study")


@pytest.mark.parametrize("keys,words", [
    ({"processes": []}, "must hold different numbers above 0"), ({"mode": "sideways"}, "must be weak or strong"),
    ({"layout": {}}, "did you mean layouts|unknown key layout"), ({"axes": {"train.seed": 3}}, "must be a list of"),
    ({"repeats": 0}, "repeats is 0"), ({"layouts": {"a": [1]}}, "layouts.a is"),
    ({"set": {"parallel.tensor": 3}}, "no cell of the study is legal"),
    ({"set": {"train.steps": 3}}, "set by the study's protocol"),
])
def test_a_study_that_makes_no_sense_is_refused(tmp_path: Path, keys: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(read_study_file(study_file(tmp_path, **keys)), tmp_path / "study")
    assert not (tmp_path / "study/study.json").exists()


def test_other_folders_are_no_studies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder of a scaling study"):
        read_study(tmp_path)
    with pytest.raises(UserError, match="collect first"):
        read_results(tmp_path)
    with pytest.raises(ConfigError, match="are for --submit"):
        scaling.submit([str(tmp_path), "--print", "--wait"])


def test_the_warm_up_is_left_out_and_waiting_for_data_is_told_apart() -> None:
    rows = [step(1, step_seconds=60.0), step(2), step(3, data_wait_seconds=0.1), step(4, data_wait_seconds=0.1)]
    found = measure(rows, 1)
    assert (found["steps"], found["tokens_per_second"], found["step_seconds"]) == (3, 50.0, 2.0)
    assert found["data_wait_share"] == pytest.approx(0.2 / 6) and found["flags"] == ""
    with pytest.raises(UserError, match="no step behind"):
        measure(rows, 4)


@pytest.mark.parametrize("change,flag", [
    (lambda n: {"data_wait_seconds": 0.5}, "data-bound: 25%"),
    (lambda n: {"tokens_per_second": 50.0 if n < 6 else 40.0}, "slows down: steps a second fall to 80%"),
    (lambda n: {"ranks_probe_max": 1.5, "ranks_probe_median": 1.0}, "straggler: ranks_probe"),
    (lambda n: {"step_seconds": 1.0 + n % 2}, "wide spread"),
])
def test_suspicious_cells_are_flagged(change, flag: str) -> None:
    assert flag in measure([step(number, **change(number)) for number in range(1, 10)], 0)["flags"]


def test_efficiency_is_against_the_smallest_cell_of_the_series() -> None:
    one, two, four = summarize([cell("dp", 1, 1, 50.0), cell("dp", 2, 1, 80.0), cell("dp", 2, 2, 90.0),
                                cell("tp", 4, 1, 100.0), {"state": "failed"}])
    assert (one["efficiency"], one["low"], one["base"]) == (1.0, None, 1)
    assert two["tokens_per_second"] == 85.0 and two["efficiency"] == pytest.approx(0.85)
    assert two["low"] == 80.0 and two["high"] == 90.0
    assert (four["base"], four["efficiency"]) == (4, 1.0)


def test_results_are_kept_and_reported(tmp_path: Path) -> None:
    study = generate(read_study_file(study_file(tmp_path)), tmp_path / "study")
    lost = {"cell": "base-p2-r2", "series": "base", "processes": 2, "repeat": 2, "state": "failed", "reason": "<died>"}
    rows = [cell("base", 1, 1, 50.0), cell("base", 1, 2, 52.0), cell("base", 2, 1, 90.0), lost]
    write_results(study.folder, rows, [step(1)])
    assert [row["cell"] for row in read_results(study.folder)] == [row["cell"] for row in rows]
    write_report(study, read_results(study.folder))
    page, text = ((study.folder / name).read_text() for name in ("report.html", "report.md"))
    assert "data:image/png;base64," in page and "&lt;died&gt;" in page and "3 of 4 cells are measured" in text
    assert "| base | 2 | 1 | 90 |" in text
    with pytest.raises(UserError, match="has no measured cell"):
        write_report(study, [lost])

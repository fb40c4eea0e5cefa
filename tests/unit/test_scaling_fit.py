"""`grn-scale scaling fit`: tables of runs, run folders, and what it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table

from grn_scale.command_line import config_yaml, run
from grn_scale.config.load import load_config
from grn_scale.config.schema import LoggingConfig
from grn_scale.planning.scaling_law import Law
from grn_scale.tools.scaling_fit import main, read_run
from grn_scale.train.metrics import MetricsLog

LAW = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
ROWS = [{"run": f"r{size}-{length}", "params": float(size), "tokens": float(length), "loss": LAW.loss(size, length)}
        for size in (5 * 10**7, 3 * 10**8, 2 * 10**9) for length in (10**9, 10**10, 10**11)]
TINY = "model=model/grn_tiny.yaml"


def write_csv(path: Path, rows=ROWS) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def write_parquet(path: Path) -> Path:
    write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def write_run(folder: Path, *overrides: str, steps: int = 4, loss: float | None = 2.5) -> Path:
    folder.mkdir()
    config = load_config(None, [TINY, "train.steps=4", *overrides])
    (folder / "config.yaml").write_text(config_yaml(config))
    with MetricsLog(folder, 0, LoggingConfig()) as metrics:
        for step in range(1, steps + 1):
            metrics.write(step, {"loss": 3.0, "tokens": 1000, "model_tflops_per_second": 0.5, "step_seconds": 2.0})
        if loss is not None:
            metrics.write(steps, {"validation_loss": loss})
    return folder


def ask(capsys, *arguments) -> dict:
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("write, name", [(write_csv, "a.csv"), (write_jsonl, "a.jsonl"), (write_parquet, "a.parquet")])
def test_a_table_of_any_kind_gives_the_law_and_the_size_for_a_budget(capsys, tmp_path, write, name):
    result = ask(capsys, write(tmp_path / name), "--budget", "1e22", "--bootstrap", "20")
    assert result["runs"] == 9 and result["flops_factor"] == 6
    assert result["law"]["alpha"]["value"] == pytest.approx(LAW.alpha, rel=0.01)
    assert result["law"]["params_exponent"]["value"] == pytest.approx(0.28 / 0.62, rel=0.01)
    optimum, = result["optima"]
    assert optimum["params"]["value"] == pytest.approx(LAW.optimum(1e22)[0], rel=0.02)
    assert optimum["params"]["interval"] == pytest.approx([LAW.optimum(1e22)[0]] * 2, rel=0.02)


def test_measured_flops_replace_six_a_parameter_and_token(capsys, tmp_path):
    rows = [{**row, "flops": 8 * row["params"] * row["tokens"]} for row in ROWS]
    table = write_csv(tmp_path / "a.csv", rows)
    assert ask(capsys, table, "--bootstrap", "0")["flops_factor"] == pytest.approx(8)
    result = ask(capsys, table, "--bootstrap", "0", "--flops-factor", "7")
    assert result["flops_factor"] == 7
    assert [each["over_largest_run"] for each in result["optima"]] == pytest.approx([1, 10, 100])
    assert result["optima"][0]["params"]["interval"] is None


def test_a_run_folder_gives_parameters_tokens_loss_and_flops(tmp_path):
    from grn_scale.model.transformer import GRN

    found = read_run(write_run(tmp_path / "run"))
    model = load_config(None, [TINY]).model
    assert found.params == sum(parameter.numel() for parameter in GRN(model).parameters())
    assert (found.tokens, found.loss, found.flops) == (4000, 2.5, pytest.approx(4e12))


def test_tables_and_run_folders_are_fitted_together_and_shown(capsys, tmp_path):
    picture = tmp_path / "fit.png"
    folder = write_run(tmp_path / "run", loss=3.9)
    assert main([str(write_csv(tmp_path / "a.csv")), str(folder), "--bootstrap", "5", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "from 10 runs" in shown and "what to train for a budget" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


def refused(capsys, *arguments) -> str:
    assert run(main, [str(each) for each in arguments]) in (1, 2)
    return capsys.readouterr().err


def test_run_folders_that_tell_too_little_are_refused(capsys, tmp_path):
    assert "stands at step 3 of 4" in refused(capsys, write_run(tmp_path / "a", steps=3))
    assert "has no validation_loss" in refused(capsys, write_run(tmp_path / "b", loss=None))
    (write_run(tmp_path / "c") / "config.yaml").unlink()
    assert "has no config.yaml" in refused(capsys, tmp_path / "c")
    (tmp_path / "d").mkdir()
    assert "no metrics at" in refused(capsys, tmp_path / "d")


def test_tables_that_cannot_be_used_are_refused(capsys, tmp_path):
    table = tmp_path / "a.csv"
    write_csv(table, [{"run": "a", "params": 1.0, "loss": 2.0}])
    assert "has no column tokens" in refused(capsys, table)
    write_csv(table, [*ROWS[:3], {**ROWS[3], "loss": -1.0}])
    assert "run r300000000-1000000000: loss is -1.0" in refused(capsys, table)
    write_csv(table, [*ROWS[:3], {**ROWS[3], "loss": "nan"}])
    assert "must be a number above 0" in refused(capsys, table)
    write_csv(table, ROWS[:5])
    assert "5 runs, but five coefficients need 8" in refused(capsys, table)
    table.write_text("params,tokens,loss\n1,2\n")
    assert "cannot be read as csv" in refused(capsys, table)
    assert "correct the path" in refused(capsys, tmp_path / "missing.csv")
    assert "a table of runs ends in .csv" in refused(capsys, tmp_path / "runs.txt")


@pytest.mark.parametrize("arguments, words", [
    (["--budget", "-1"], "--budget must be"), (["--flops-factor", "inf"], "--flops-factor must be"),
    (["--bootstrap", "-1"], "must not be negative"), (["--plot", "a.gif"], "must end in .png")])
def test_bad_usage_gets_a_message(capsys, tmp_path, arguments, words):
    assert words in refused(capsys, write_csv(tmp_path / "a.csv"), *arguments)

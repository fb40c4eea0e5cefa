"""What is made of the records of a study's runs: measurements, flags, intervals and the report."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from grn_scale.atomic import write_json
from grn_scale.command_line import config_yaml, dotted_keys
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.studies.configuration import WORDS
from grn_scale.studies.report import write_report
from grn_scale.studies.results import differences, measure, read_results, write_results
from grn_scale.studies.study import Study, generate
from grn_scale.studies.study_file import read_study_file
from grn_scale.studies.summary import mean_interval, ratio_interval, summarize
from grn_scale.tools.scaling_records import ORIGIN, measured, origin
from grn_scale.train.metrics import FILE_NAME, MetricsLog
from tests.helpers.studies import cell, step, study_file

LOST = {"cell": "base-p2-r2", "series": "base", "size": "2", "processes": 2, "repeat": 2, "state": "failed",
        "reason": "<died>"}


def small_study(folder: Path, **keys: object) -> Study:
    return generate(read_study_file(study_file(folder, **keys)), folder / "study")


def test_the_warm_up_is_left_out_and_waiting_for_data_is_told_apart() -> None:
    rows = [step(1, step_seconds=60.0, peak_memory_bytes=99), step(2, peak_memory_bytes=5, peak_memory_of="GPU"),
            step(3, data_wait_seconds=0.1, peak_memory_bytes=7), step(4, data_wait_seconds=0.1)]
    found = measure(rows, 1)
    assert (found["steps"], found["tokens_per_second"], found["step_seconds"]) == (3, 50.0, 2.0)
    assert found["data_wait_share"] == pytest.approx(0.2 / 6) and found["flags"] == ""
    assert (found["peak_memory_bytes"], found["peak_memory_of"], found["peak_reserved_bytes"]) == (7, "GPU", None)
    with pytest.raises(UserError, match="no step behind"):
        measure(rows, 4)
    with pytest.raises(UserError, match="went on in 2 starts: that is no measurement"):
        measure([step(1, attempt=1), step(2, attempt=2)], 0)


@pytest.mark.parametrize("change,flag", [
    (lambda n: {"data_wait_seconds": 0.5}, "data-bound: 25%"),
    (lambda n: {"tokens_per_second": 50.0 if n < 6 else 40.0}, "slows down: steps a second fall to 80%"),
    (lambda n: {"ranks_probe_max": 1.5, "ranks_probe_median": 1.0}, "straggler: the slowest process takes 1.50 times "
     "as long as the median one for the same small computation"),
    (lambda n: {"replicas_forward_backward_max": 2.8, "replicas_forward_backward_median": 2.0}, "straggler: forward "
     "and backward of the slowest copy of the model take 1.40 times as long as those of the median copy"),
    (lambda n: {"step_seconds": 1.0 + n % 2}, "wide spread"),
])
def test_suspicious_cells_are_flagged(change, flag: str) -> None:
    assert flag in measure([step(number, **change(number)) for number in range(1, 10)], 0)["flags"]


def test_cells_that_differ_in_what_they_should_share_are_told() -> None:
    rows = [cell("dp", 1, 1, 50.0), cell("dp", 2, 1, 50.0, commit="def"), {"state": "failed", "torch": "1"}]
    assert differences(rows) == ["commit: abc, def"]


def test_intervals_are_those_of_the_tables() -> None:
    found = mean_interval([100.0, 110.0, 105.0])
    logs = [math.log(value) for value in (100.0, 110.0, 105.0)]
    mean = sum(logs) / 3
    half = 4.302653 * math.sqrt(sum((each - mean) ** 2 for each in logs) / 2 / 3)  # t of 0.975 with two degrees
    assert (found.low, found.high) == (pytest.approx(math.exp(mean - half)), pytest.approx(math.exp(mean + half)))
    assert mean_interval([100.0]).low is None
    equal = ratio_interval([200.0, 220.0], [100.0, 110.0], 0.5)
    assert equal.value == pytest.approx(1.0) and equal.low * equal.high == pytest.approx(1.0)
    assert equal.high == pytest.approx(math.exp(4.302653 * math.sqrt(2) * math.log(1.1) / 2))
    assert ratio_interval([200.0], [100.0, 110.0], 0.5).low is None


def test_efficiency_is_against_the_smallest_cell_of_the_series() -> None:
    two, *rest = [cell("dp", 2, 1, 80.0), cell("dp", 1, 1, 50.0), cell("dp", 2, 2, 90.0), cell("tp", 4, 1, 100.0),
                  {"state": "failed"}]
    one, two, four = summarize([two, *rest])
    assert (one["efficiency"].value, one["throughput"].low, one["base"]) == (1.0, None, "1")
    assert two["efficiency"].value == pytest.approx(math.sqrt(80 * 90) / 100) and two["repeats"] == 2
    assert two["throughput"].low < 80.0 and two["throughput"].high > 90.0
    assert (four["base"], four["efficiency"].value) == ("4", 1.0)


class Page(HTMLParser):
    """Tags and addresses of a page; fails on one that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_results_are_kept_and_reported(tmp_path: Path) -> None:
    study = small_study(tmp_path, layouts={"base": {}, "tp": {"parallel.tensor": 2}})
    rows = [cell("base", 1, 1, 50.0), cell("base", 1, 2, 52.0),
            cell("base", 2, 1, 90.0, flags="wide spread", cores=1), LOST]
    write_results(study.folder, rows, [step(1)])
    assert [row["cell"] for row in read_results(study.folder)] == [row["cell"] for row in rows]
    write_report(study, read_results(study.folder))
    page, text = ((study.folder / name).read_text() for name in ("report.html", "report.md"))
    found = Page(page)
    assert not found.open and "script" not in found.tags
    assert found.addresses and all(each.startswith("data:image/svg+xml;base64,") for each in found.addresses)
    assert "&lt;died&gt;" in page and "3 of 4 runs are measured" in text and "| base | 2 | 1 | 90 |" in text
    for words in ("wide spread", "illegal", "parallel.tensor", "resident memory", "## Where it ran", "tokens/s",
                  "No prediction: the runs found no GPU", "bench gpu --hardware",
                  "Cells with 2 processes a node share 1 cores: their efficiency says nothing about GPUs"):
        assert words in text, words
    with pytest.raises(UserError, match=r"has no measured cell \(base-p2-r2: failed\): submit"):
        write_report(study, [LOST])
    with pytest.raises(UserError, match="has no measured cell"):
        write_report(study, [])
    with pytest.raises(ConfigError, match="unknown GPU 'H1OO': did you mean H100"):
        write_report(study, rows, "H1OO")


def told(study: Study, *rows: dict) -> str:
    """The Markdown report of these rows."""
    write_report(study, rows)
    return (study.folder / "report.md").read_text()


def test_a_report_tells_the_configuration_that_all_series_start_from_and_each_layout(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("parallel: {context: 2}\nzero: {stage: 2}\n")
    study = small_study(tmp_path, config="run.yaml", processes=[2, 4], mode="weak", layouts={
        "tp": {"parallel.tensor": 2, "parallel.context": 1, "parallel.recompute": "selective"}, "dp": {},
        "pp": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, "parallel.context": 1, "zero.stage": 1}},
        axes={"kernels.compile": ["auto", "never"]})
    text = told(study, cell("tp-compileauto", 2, 1, 50.0))
    for line in ("| dp-compileauto | kernels.compile = auto | TP 1, PP 1, CP 2, DP 1 to 2, ZeRO-2, recompute none |",
                 "TP 2 with SP, PP 1, CP 1, DP 1 to 2, ZeRO-2, recompute selective (mlp) |",
                 "TP 1, PP 2 (VPP 2), CP 1, DP 1 to 2, ZeRO-1, recompute none |",
                 "| parallel.tensor | 1; varies between series: 1, 2 |", "| parallel.context | 2; varies between",
                 "| zero.stage | 2; varies between series: 1, 2 |", "| zero.offload_optimizer | false |",
                 "| kernels.compile | varies between series: auto, never |", "| kernels.attention | auto |",
                 "| data.packs_per_step | varies with the number of processes: 4, 8 |", "| optimizer.name | adamw |",
                 "| train.precision | bf16 |", "| data.token_budget | 128 |", "| text.states | auto |",
                 "| Nodes x processes of each | 1 x 2 |", "packs of a step, over all processes: varies with"):
        assert line in text, line
    assert "data parallel alone" not in text and "kernels.cross_entropy" not in text


def test_every_key_of_a_layout_is_told_in_words() -> None:
    keys = [key for key in dotted_keys(Config) if key.startswith(("parallel.", "zero.", "kernels."))]
    assert [key for key in keys if key not in WORDS] == []


def test_models_that_vary_are_told_as_such(tmp_path: Path) -> None:
    study = small_study(
        tmp_path, set={"data.packs_per_step": 2}, layouts={"dp": {}, "tp": {"parallel.tensor": 2}},
        axes={"model": ["configs/model/grn_tiny.yaml", "configs/model/grn_0b.yaml"]})
    text = told(study, cell("dp-modelgrn_tiny", 1, 1, 50.0))
    assert "model: varies between series: 6 layers of width 256" in text and "over all processes: 2\n" in text
    assert "parallel.tensor = 2, model = configs/model/grn_0b.yaml | TP 2 with SP, PP 1, CP 1, DP 1, ZeRO-1" in text


def test_predictions_are_compared_where_the_hardware_is_known(tmp_path: Path) -> None:
    study = small_study(tmp_path, set={"model": "configs/model/grn_tiny.yaml", "data.packs_per_step": 2})
    gpu = {"gpu": "NVIDIA H100 80GB HBM3", "peak_memory_of": "GPU", "mfu": 0.3, "hfu": 0.4}
    write_report(study, [cell("base", 1, 1, 5e5, **gpu), cell("base", 2, 1, 9e5, **gpu)])
    text = (study.folder / "report.md").read_text()
    assert "predicted tensors (GB)" in text and "The prediction assumes:" in text and "H100 of 79.1 GiB" in text
    assert "| 30.0% | 40.0% |" in text
    entry = {"nodes": 1, "matmul_bf16": 4e11, "matmul_fp32": 1e11, "attention_bf16": [9e10, 1.3e11],
             "attention_fp32": [8e10, 8e10], "bandwidth": 3e10}
    file = tmp_path / "machine.yaml"
    file.write_text(yaml.safe_dump({"device": "CPU", "memory_gib": 8.0, "measured": [{"processes": 1, **entry}]}))
    write_report(study, [cell("base", 1, 1, 5e5), cell("base", 2, 1, 9e5)], str(file))
    text = (study.folder / "report.md").read_text()
    assert "machine.yaml, measured while 1 process computed" in text
    assert "No prediction: " in text and "tells nothing of the links" in text


def finished_run(study: Study, attempt: Path, **settings: object) -> None:
    """What a run of the study's first cell leaves."""
    config = load_config(study.config_of(study.cells[0]), [f"output={attempt}", *(
        f"{key}={value}" for key, value in settings.items())])
    attempt.mkdir()
    (attempt / "config.yaml").write_text(config_yaml(config))
    with MetricsLog(attempt, 0, config.logging) as log:
        for number in range(1, 12):
            log.write(number, {key: value for key, value in step(number).items() if key != "step"})


def test_a_run_of_another_configuration_is_no_measurement_of_its_cell(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    first = study.cells[0]
    attempts = [study.cell_folder(first) / f"attempt-000{number}" for number in (1, 2, 3)]
    finished_run(study, attempts[0])
    found, steps = measured(study, first, attempts[0])
    assert found["steps"] == 9 and len(steps) == 11
    finished_run(study, attempts[1], **{"model.hidden_size": 64})
    with pytest.raises(UserError, match="another configuration than its cell: model.hidden_size 32 -> 64"):
        measured(study, first, attempts[1])
    finished_run(study, attempts[2])
    (attempts[2] / FILE_NAME).unlink()
    with pytest.raises(UserError, match="no metrics at"):
        measured(study, first, attempts[2])


def test_a_row_says_where_it_comes_from(tmp_path: Path) -> None:
    study = small_study(tmp_path)
    attempt = study.cell_folder(study.cells[0]) / "attempt-0001"
    finished_run(study, attempt)
    records = attempt / "slurm/0001"
    (records / "preflight/7-0").mkdir(parents=True)
    write_json(records / "submission.json", {
        "kind": "train", "cluster": "site", "nodes": 2, "processes_per_node": 4, "gpus_per_node": 4,
        "git": {"commit": "abc", "dirty": False}, "versions": {"python": "3.10", "torch": "0"}, "submitted": 1.0})
    common = {"job": 7, "task": None, "restart": 0}
    (records / "starts.jsonl").write_text("".join(json.dumps(event) + "\n" for event in (
        {"event": "start", "time": 10, "progress": 0, "nodes": "n1,n2", **common},
        {"event": "end", "time": 20, "progress": 11, "code": 0, "decision": "done", **common})))
    write_json(records / "preflight/7-0/n1.json", {"results": [{"measured": {"sum_gigabytes_per_second": 42.0}}]})
    write_json(attempt / "surroundings.json", {"hardware": {"gpus": ["H100"], "cpu": "EPYC", "cores": 8},
                                               "versions": {"torch": "2.13", "nccl": "2.27", "cuda": "12.8"},
                                               "driver": "570.1"})
    attempt.with_name("attempt-0001.site.yaml").write_text("environment: {NCCL_SOCKET_IFNAME: ib0, HOME: /x}\n")
    found = origin(attempt)
    assert list(found) == list(ORIGIN)
    assert {key: found[key] for key in ("job", "node_count", "gpu", "interconnect", "network_gigabytes_per_second",
                                        "driver", "torch", "nccl", "python", "commit", "began", "deepspeed")} == {
        "job": "7", "node_count": 2, "gpu": "H100", "interconnect": "NCCL_SOCKET_IFNAME=ib0",
        "network_gigabytes_per_second": 42.0, "driver": "570.1", "torch": "2.13", "nccl": "2.27", "python": "3.10",
        "commit": "abc", "began": 10, "deepspeed": None}

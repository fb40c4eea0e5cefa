"""A measured machine, in place of a data sheet: what the benchmark writes, and what the planner makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError
from grn_scale.perf import bench, bench_hardware
from grn_scale.perf.bench_hardware import Sizes, counts
from grn_scale.planning.grn_machine import find_machine
from grn_scale.planning.grn_time import step_time
from grn_scale.planning.measured import read_measured
from grn_scale.tools import plan

ENTRY = {"processes": 1, "nodes": 1, "matmul_bf16": 4e11, "matmul_fp32": 1e11, "attention_bf16": [9e10, 1.3e11],
         "attention_fp32": [8e10, 8e10], "bandwidth": 3e10}
LINKED = {**ENTRY, "processes": 2, "matmul_fp32": 9e10, "all_reduce": 1.5e9, "latency": 5e-4}


def hardware_file(folder: Path, *entries: dict, device: str = "CPU of a test") -> str:
    path = folder / "machine.yaml"
    path.write_text(yaml.safe_dump({"device": device, "memory_gib": 8.0, "measured": list(entries)}))
    return str(path)


def small(**train: object):
    config = load_config(None, ["model=configs/model/grn_tiny.yaml", "data.packs_per_step=4"])
    return replace(config, train=replace(config.train, **train))


def test_rates_are_those_of_the_nearest_number_of_processes(tmp_path: Path) -> None:
    file = hardware_file(tmp_path, ENTRY, LINKED)
    one, two, four = (find_machine(small(), file, 1, count) for count in (1, 2, 4))
    assert (one.fp32, two.fp32, four.fp32) == (1e11, 9e10, 9e10)
    pair = two.group(2, 1)
    assert (pair.all_reduce(1.5e9)) == pytest.approx(1.0 + 2 * 5e-4)
    assert "measured while 2 processes computed" in " ".join(two.assumed())
    fast, slow = (step_time(small(precision=precision), two).parts["matrix products"] for precision in ("bf16", "fp32"))
    assert fast < slow


def test_what_was_not_measured_comes_from_the_data_sheet_where_there_is_one(tmp_path: Path) -> None:
    known = hardware_file(tmp_path, ENTRY, device="NVIDIA H100 80GB HBM3")
    assert find_machine(small(), known, 2, 8).gpu.bf16 == 989e12
    with pytest.raises(ConfigError, match="tells nothing of the links between 2 processes of a node: measure with as"):
        find_machine(small(), hardware_file(tmp_path, ENTRY), 1, 2)
    with pytest.raises(ConfigError, match="between 2 nodes"):
        find_machine(small(), hardware_file(tmp_path, ENTRY, LINKED), 2, 2)


@pytest.mark.parametrize("change,words", [
    ({"matmul_fp32": 0.0}, "measured.matmul_fp32 is 0.0, but must be greater than 0"),
    ({"matmul_fp33": 1.0}, "unknown key measured"), ({"processes": 2}, "lacks all_reduce or latency"),
    ({"bandwidth": None}, "bandwidth")])
def test_a_file_that_no_benchmark_wrote_is_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"machine.yaml: .*{words}.*bench gpu --hardware"):
        read_measured(Path(hardware_file(tmp_path, {**ENTRY, **change})))


def test_a_file_without_entries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="measured is empty"):
        read_measured(Path(hardware_file(tmp_path)))


def test_what_the_benchmark_writes_is_what_the_planner_reads(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_hardware, "CPU", Sizes(product=64, tokens=64, memory=1 << 12, message=1 << 12))
    monkeypatch.setattr(bench_hardware, "LEAST_SECONDS", 0.0)
    path = tmp_path / "machine.yaml"
    assert bench.main(["gpu", "--hardware", str(path), "--repeats", "2", "--json", "train.threads=1"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["measured"][0]["processes"] == 1
    assert path.read_text().startswith("# Written by `grn-scale bench gpu --hardware`: 20")
    assert read_measured(path).near(4).matmul_fp32 > 0
    assert plan.main(["--gpu", str(path), "--gpus-per-node", "1", "model=configs/model/grn_tiny.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["time"]["step_seconds"] > 0
    with pytest.raises(ConfigError, match="`grn-scale bench gpu` alone takes it"):
        bench.main(["train", "--hardware", str(path)])


def test_it_is_measured_with_powers_of_two_and_with_all() -> None:
    assert [counts(world) for world in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]

"""Scaling studies: the matrix that follows from a file, and how its jobs are placed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grn_scale.config.cluster import Cluster
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError, UserError
from grn_scale.studies.results import read_results
from grn_scale.studies.study import generate, read_study
from grn_scale.studies.study_file import Size, read_study_file
from grn_scale.tools import scaling
from grn_scale.tools.scaling_jobs import place
from tests.helpers.studies import study_file


def test_every_legal_combination_is_a_cell_and_the_others_keep_their_reason(tmp_path: Path) -> None:
    file = read_study_file(study_file(tmp_path, layouts={"dp": None, "tp": {"parallel.tensor": 2}},
                                      axes={"data.token_budget": [128, 256]}, mode="weak"))
    study = generate(file, tmp_path / "study")
    assert {(made.series, made.size.processes) for made in study.cells} == {
        ("dp-token_budget128", 1), ("dp-token_budget128", 2), ("dp-token_budget256", 1), ("dp-token_budget256", 2),
        ("tp-token_budget128", 2), ("tp-token_budget256", 2)}
    assert len(study.cells) == 12 and [each["size"] for each in study.illegal] == ["1", "1"]
    assert "parallel.tensor" in study.illegal[0]["reason"]
    config = load_config(study.folder / "cells/dp-token_budget256-p2-r1/config.yaml", [])
    assert (config.data.packs_per_step, config.data.token_budget, config.train.steps) == (8, 256, 11)
    assert read_study(tmp_path / "study") == study
    with pytest.raises(UserError, match="is not empty"):
        generate(file, tmp_path / "study")


def test_models_sequence_lengths_and_zero_stages_are_axes(tmp_path: Path) -> None:
    axes = {"model": ["configs/model/grn_tiny.yaml", "configs/model/grn_0b.yaml"], "zero.stage": [1, 2],
            "data.token_budget": [1024, 2048]}
    file = study_file(tmp_path, set={"data.packs_per_step": 2}, processes=[2], axes=axes)
    study = generate(read_study_file(file), tmp_path / "study")
    assert len(study.cells) == 2 * 2 * 2 * 2
    config = load_config(study.config_of(study.cells[-1]))
    assert study.cells[-1].name == "base-modelgrn_0b-stage2-token_budget2048-p2-r2"
    assert (config.model.hidden_size, config.zero.stage, config.data.token_budget) == (512, 2, 2048)


def test_a_shipped_run_is_measured_for_any_number_of_steps(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("config: configs/runs/grn_8b.yaml\nprocesses: [64]\nwarmup_steps: 2\nmeasured_steps: 4\n"
                    "mode: strong\n")
    study = generate(read_study_file(file), tmp_path / "study")
    assert study.cells and not study.illegal
    assert load_config(study.config_of(study.cells[0])).train.keep_every == 0


@pytest.mark.parametrize("keys,words", [
    ({"processes": []}, r"processes is \[\], but must be a list"), ({"processes": None}, "must be a list of numbers"),
    ({"processes": [0]}, "processes holds 0, but must hold numbers of processes above 0"),
    ({"processes": ["2x"]}, "processes holds '2x'"), ({"processes": [2, 2]}, "holds a size twice"),
    ({"mode": "sideways"}, "must be weak or strong"), ({"layout": {}}, "unknown key layout; did you mean layouts"),
    ({"axes": {"train.seed": [3]}}, "axes sets train.seed, which is no configuration key"),
    ({"axes": {"model.hidden": [3]}}, "did you mean model.hidden_size"),
    ({"axes": {"seed": 3}}, "must be a list of"), ({"axes": {"seed": [3, 3]}}, "a list of different values"),
    ({"repeats": 0}, "repeats is 0"), ({"measured_steps": 1}, "measured_steps is 1, but must be at least 2"),
    ({"layouts": {"a": [1]}}, "layouts.a is"), ({"set": {"output": "x"}}, "set sets output"),
    ({"layouts": {"a": {"zero.stage": 1}}, "axes": {"zero.stage": [1]}}, "stands in layouts.a and in axes"),
    ({"set": {"parallel.tensor": 3}}, "no cell of the study is legal"),
    ({"set": {"train.steps": 3}}, "set by the study's protocol"),
    ({"layouts": {"a b": {}, "a_b": {}}}, "two cells would be called a_b-p1-r1"),
])
def test_a_study_that_makes_no_sense_is_refused(tmp_path: Path, keys: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        generate(read_study_file(study_file(tmp_path, **keys)), tmp_path / "study")
    assert not (tmp_path / "study/study.json").exists()


def test_a_configuration_that_was_changed_by_hand_is_refused(tmp_path: Path) -> None:
    study = generate(read_study_file(study_file(tmp_path)), tmp_path / "study")
    path = study.config_of(study.cells[0])
    path.write_text(path.read_text().replace("hidden_size: 32", "hidden_size: 64"))
    site = tmp_path / "site.yaml"
    site.write_text("processes_per_node: 2\n")
    with pytest.raises(UserError, match="config.yaml is not what `scaling generate` wrote.*generate another study"):
        scaling.submit([str(study.folder), "--cluster", str(site), "--print"])
    path.unlink()
    with pytest.raises(UserError, match="put it back"):
        study.config_of(study.cells[0])


@pytest.mark.parametrize("size,site,expected", [
    (Size(1), {"gpus_per_node": 8}, (1, 1)), (Size(8), {"gpus_per_node": 8}, (1, 8)),
    (Size(16), {"gpus_per_node": 8}, (2, 8)), (Size(2), {"processes_per_node": 4}, (1, 2)),
    (Size(8), {"processes_per_node": 4}, (2, 4)), (Size(4, 2), {"gpus_per_node": 8}, (2, 2)),
    (Size(4, 2), {"processes_per_node": 4}, (2, 2)), (Size(3, 1), {}, (3, 1))])
def test_processes_are_placed_on_nodes_with_and_without_gpus(size: Size, site: dict, expected: tuple) -> None:
    nodes, found = place(size, Cluster("test", **site))
    assert (nodes, found.gpus_per_node or found.processes_per_node) == expected
    assert bool(found.gpus_per_node) == ("gpus_per_node" in site)


@pytest.mark.parametrize("size,site,words", [
    (Size(2), {}, "how many processes has a node of cluster test"),
    (Size(12), {"gpus_per_node": 8}, "do not fill nodes of 8"),
    (Size(8, 8), {"processes_per_node": 4}, "has 4, not 8")])
def test_sizes_that_nodes_cannot_hold_are_refused(size: Size, site: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        place(size, Cluster("test", **site))


def test_a_size_reads_as_it_is_written() -> None:
    assert [Size.read(value, "x").label for value in (4, "2x4")] == ["4", "2x4"]
    assert Size.read("2x4", "x") == Size(8, 4)


def test_jobs_get_the_site_with_the_processes_of_their_cell(tmp_path: Path, monkeypatch) -> None:
    study = generate(read_study_file(study_file(tmp_path, processes=[1, "2x1"])), tmp_path / "study")
    site = tmp_path / "site.yaml"
    site.write_text("processes_per_node: 4\naccount: research\n")
    seen = []

    def job(kind: str, argv: list[str]) -> int:
        options = dict(zip(argv, argv[1:]))
        seen.append((options["--nodes"], yaml.safe_load(Path(options["--cluster"]).read_text()), options.get("--time")))
        return 0

    monkeypatch.setattr("grn_scale.slurm.submit.main", job)
    assert scaling.submit([str(study.folder), "--cluster", str(site), "--print", "--time", "9"]) == 0
    assert [(nodes, site["processes_per_node"], site["account"], time) for nodes, site, time in seen] == [
        ("1", 1, "research", "9"),  # whether the options are legal
        *[("1", 1, "research", "9"), ("2", 1, "research", "9")] * 2]  # all cells once, then again
    assert not list(study.folder.glob("cells/*/*.site.yaml"))  # to print is to write nothing


@pytest.mark.parametrize("options,words", [
    (["--time", "abc"], "'abc' is no time limit"), (["--time", "99"], "longer than the longest of cluster"),
    (["--sbatch", "nodes=4"], "the job has it already"), (["--sbatch", "re servation"], "none of the long options")])
@pytest.mark.parametrize("what", ["--print", "--dry-run", "--submit"])
def test_options_that_no_job_can_have_are_refused_once(tmp_path: Path, capsys, options: list, words: str,
                                                       what: str) -> None:
    study = generate(read_study_file(study_file(tmp_path)), tmp_path / "study")
    site = tmp_path / "site.yaml"
    site.write_text("processes_per_node: 4\ntime_limit: '60'\n")
    with pytest.raises(ConfigError, match=words):
        scaling.submit([str(study.folder), "--cluster", str(site), what, *options])
    shown = capsys.readouterr()
    assert not shown.out and "ERROR" not in shown.err and not list(study.folder.glob("cells/*/attempt*"))


def test_a_reason_that_cells_share_is_told_once(tmp_path: Path, monkeypatch, capsys) -> None:
    study = generate(read_study_file(study_file(tmp_path, repeats=1, processes=[1, 2, 4])), tmp_path / "study")
    site = tmp_path / "site.yaml"
    site.write_text("processes_per_node: 4\n")

    def job(kind: str, argv: list[str]) -> int:
        if argv[-1] == "--submit":
            where = next(word for word in argv if word.startswith("output="))
            raise UserError(f"sbatch refused the job: no such partition; what it got is {where}/job.sbatch")
        return 0

    monkeypatch.setattr("grn_scale.slurm.submit.main", job)
    assert scaling.submit([str(study.folder), "--cluster", str(site), "--submit"]) == 1
    first, rest = [line for line in capsys.readouterr().err.splitlines() if "ERROR" in line]
    assert "base-p1-r1: sbatch refused the job: no such partition; what it got is" in first
    assert rest.endswith("refused for the same reason as base-p1-r1: base-p2-r1, base-p4-r1")


def test_nothing_is_collected_where_no_cell_has_ended(tmp_path: Path, monkeypatch) -> None:
    study = generate(read_study_file(study_file(tmp_path)), tmp_path / "study")
    with pytest.raises(UserError, match=r"no cell of .*/study has been submitted: `grn-scale scaling submit .*/study "
                       r"--cluster FILE.yaml --submit` does it") as error:
        scaling.collect([str(study.folder)])
    assert "\n" not in str(error.value) and error.value.exit_code == 1
    states = [("in the queue", "RUNNING"), ("in the queue", "PENDING"), ("in the queue", "PENDING")]

    def standing(states: list) -> None:
        found = dict(zip((cell.name for cell in study.cells), states))
        monkeypatch.setattr("grn_scale.tools.scaling_jobs.state_of", lambda study, cell: (*found[cell.name], None))

    standing([*states, ("in the queue", "COMPLETING")])
    with pytest.raises(UserError, match="has ended: 1 running, 2 waiting, 1 COMPLETING; collect again later"):
        scaling.collect([str(study.folder)])
    standing([*states, ("missing", "never submitted")])
    with pytest.raises(UserError, match="2 waiting, 1 never submitted .`grn-scale scaling submit .*; collect"):
        scaling.collect([str(study.folder)])
    assert sorted(path.name for path in study.folder.iterdir()) == ["cells", "study.json"]
    standing([*states, ("failed", "died")])
    assert scaling.collect([str(study.folder)]) == 1
    assert [row["state"] for row in read_results(study.folder)] == ["in the queue"] * 3 + ["failed"]


def test_other_folders_are_no_studies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder of a scaling study"):
        read_study(tmp_path)
    with pytest.raises(UserError, match="collect first"):
        read_results(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="collect again"):
        read_results(tmp_path)
    with pytest.raises(ConfigError, match="are for --submit"):
        scaling.submit([str(tmp_path), "--print", "--wait"])
    with pytest.raises(ConfigError, match="cannot read the study file"):
        scaling.generate(["--config", str(tmp_path / "absent.yaml"), f"output={tmp_path / 'x'}"])

"""grn-scale plan: what it prints, what it refuses, and which layout it finds."""

from __future__ import annotations

import json

import pytest

from grn_scale.cli import main
from grn_scale.config.cluster import Cluster
from grn_scale.config.load import load_config
from grn_scale.errors import ConfigError
from grn_scale.planning.grn_layouts import changed, legal_layouts
from grn_scale.planning.grn_machine import find_machine
from grn_scale.planning.grn_time import step_time
from grn_scale.tools.plan_search import ranked

RUN = ["--config", "configs/runs/grn_8b.yaml"]
ON_32_NODES = ["plan", *RUN, "--cluster", "configs/clusters/bare_h100.yaml", "--nodes", "32"]


def planned(capsys, *arguments: str, code: int = 0) -> dict:
    assert main([*ON_32_NODES, *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_the_shipped_run_of_the_8b_model_fits_and_adds_up(capsys):
    result = planned(capsys, "--tokens", "1e12", "--price", "2")
    assert result["verdict"]["fits"] and result["gpus"] == 256 and result["gpu"] == "H100"
    (stage,), time = result["stages"], result["time"]
    assert stage["parameters"] == 7_890_859_520
    assert stage["phases"]["step"] == stage["bytes"]["peak"] + sum(stage["beside"].values())
    assert time["step_seconds"] == pytest.approx(sum(time["parts"].values()))
    assert time["tokens_per_second"] * time["step_seconds"] == pytest.approx(64 * 36864)
    assert time["days"] == pytest.approx(1e12 / time["tokens_per_second"] / 86400)
    assert time["cost"] == pytest.approx(1000 * time["cost_per_1e9_tokens"])
    assert 0.2 < time["mfu"] <= time["hfu"] < 0.75


def test_the_tables_name_stages_phases_and_assumptions(capsys):
    assert main([*ON_32_NODES, "parallel.context=1", "parallel.tensor=8", "parallel.pipeline=2", "zero.stage=1"]) == 0
    text = capsys.readouterr().out
    for words in ("stage 0", "stage 1", "activations", "GPU, phase load", "host, phase save", "fits:", "bubble",
                  "hidden behind computation", "tokens/s", "assumed:", "configs/planner/efficiencies.yaml"):
        assert words in text, words


def test_a_layout_that_does_not_fit_ends_with_1_and_names_the_nearest_that_do(capsys):
    settings = ["parallel.context=1", "parallel.tensor=2", "data.packs_per_step=128"]
    verdict = planned(capsys, *settings, code=1)["verdict"]
    assert not verdict["fits"] and verdict["most_bytes"] > verdict["limit_bytes"]
    for near in verdict["nearest"]:
        again = planned(capsys, *settings, *near["settings"])["verdict"]
        assert again["fits"] and again["most_bytes"] == near["most_bytes"]
    assert main([*ON_32_NODES, *settings]) == 1
    assert "DOES NOT FIT" in (text := capsys.readouterr().out) and "would fit" in text


def test_a_model_that_fits_nowhere_is_told_what_to_change(capsys):
    alone = ["plan", *RUN, "--gpu", "L40S", "--gpus-per-node", "1", "parallel.context=1",
             "data.token_budget=1048576"]
    for more in ([], ["--search"]):
        assert main([*alone, *more]) == 1
        text = capsys.readouterr().out
        assert "no layout fits" in text and "--nodes" in text and "data.token_budget" in text


@pytest.mark.parametrize("arguments, words", [
    (["--nodes", "0"], "--nodes is 0, but must be at least 1"),
    (["--gpu", "H1OO"], "unknown GPU"),
    (["--gpus-per-node", "-1"], "--gpus-per-node is -1"),
    (["--tokens", "nan"], "--tokens is nan"),
    (["--price", "-2"], "--price is -2.0"),
    (["parallel.tensor=3"], "parallel.tensor is 3"),
    (["--search", "--config", "configs/runs/class_b.yaml"], "class-to-image"),
    (["--config", "configs/runs/class_b.yaml"], "class-to-image")])
def test_bad_input_is_refused_with_a_remedy(capsys, arguments, words):
    assert main([*ON_32_NODES, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_mistyped_action_is_told_the_right_one(capsys):
    assert main(["plan", "simulat"]) == 2
    assert "did you mean simulate?" in capsys.readouterr().err


def test_the_machine_must_be_named(capsys):
    assert main(["plan", *RUN]) == 2
    assert "Give --cluster FILE, or --gpu H100" in capsys.readouterr().err
    assert main(["plan", *RUN, "--gpu", "H100"]) == 2
    assert "give --gpus-per-node 8" in capsys.readouterr().err
    assert main(["plan", *RUN, "--cluster", "configs/clusters/apptainer_cpu.yaml"]) == 2
    assert "has no `gpu:`" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="price_per_gpu_hour is -1"):
        Cluster(name="x", price_per_gpu_hour=-1.0)


def test_the_search_ranks_layouts_that_fit_and_explains_the_first(capsys):
    result = planned(capsys, "--search")
    times = [each["time"]["step_seconds"] for each in result["layouts"]]
    assert times == sorted(times) and 0 < result["fitting"] < result["legal"]
    assert all(each["most_bytes"] <= result["limit_bytes"] < result["gpu_bytes"] for each in result["layouts"])
    assert any(sentence.startswith("other degrees") for sentence in result["why"])
    again = planned(capsys, *result["layouts"][0]["settings"])
    assert again["time"]["step_seconds"] == pytest.approx(times[0])
    assert main([*ON_32_NODES, "--search"]) == 0
    assert "legal layouts fit" in capsys.readouterr().out


def test_what_the_dry_run_cannot_check_is_ranked_apart(capsys):
    result = planned(capsys, "--search")
    assert not any(each["estimated"] for each in result["layouts"])
    assert result["estimated"]["estimated"] and any("ranked apart" in sentence for sentence in result["why"])
    assert "ZeRO-3" in result["estimated"]["layout"]


DENSE = ["plan", "--dense", "configs/planner/llama3_8b.yaml", "--gpu", "H100", "--gpus-per-node", "8"]


def dense(capsys, *arguments: str, code: int = 0) -> dict:
    assert main([*DENSE, *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_dense_transformer_is_planned_from_its_figures(capsys):
    result = dense(capsys, "--nodes", "8", "--tokens", "1e12", "--price", "2")
    (stage,), time = result["stages"], result["time"]
    assert result["parameters"] == 8_030_261_248 and result["verdict"]["fits"]
    assert stage["phases"]["step"] == stage["bytes"]["peak"] + sum(stage["beside"].values())
    assert stage["bytes"]["weights"] == pytest.approx(2 * 8.03e9 / 2, rel=0.01)
    assert time["step_seconds"] == pytest.approx(sum(time["parts"].values()), rel=1e-6)
    assert time["tokens_per_second"] * time["step_seconds"] == pytest.approx(512 * 8192)
    assert time["cost"] == pytest.approx(1000 * time["cost_per_1e9_tokens"])
    full = dense(capsys, "--nodes", "8", "recompute=full")["time"]
    assert full["hfu"] > full["mfu"] and full["mfu"] < time["mfu"] == time["hfu"]
    assert dense(capsys, "--nodes", "8", "causal=false")["time"]["parts"]["attention"] > time["parts"]["attention"]
    assert main([*DENSE, "--nodes", "8"]) == 0
    text = capsys.readouterr().out
    for words in ("fullest rank", "fragmentation", "GPU, phase save", "fits:", "matrix products", "tokens/s"):
        assert words in text, words


def test_precision_kind_network_and_uneven_stages_of_a_dense_transformer_count(capsys):
    plain, fp8, video, slow = (dense(capsys, "--nodes", "8", *settings) for settings in (
        (), ("precision=fp8",), ("diffusion=true",), ("--network", "50")))
    part = {name: result["time"]["parts"] for name, result in
            (("plain", plain), ("fp8", fp8), ("video", video), ("slow", slow))}
    assert part["fp8"]["matrix products"] < 0.7 * part["plain"]["matrix products"] < part["video"]["matrix products"]
    assert part["slow"]["ZeRO and data"] > part["plain"]["ZeRO and data"]
    assert any("published image and video programs" in words for words in video["assumed"])
    assert any("6.25 GB/s to other nodes" in words for words in slow["assumed"])
    dense(capsys, "--nodes", "8", "layers=31", "tp=2", "pp=4")
    layouts = dense(capsys, "--nodes", "8", "layers=31", "--search")["layouts"]
    assert layouts


def test_the_dense_search_ranks_layouts_that_its_settings_make(capsys):
    result = dense(capsys, "--nodes", "2", "--search")
    times = [each["time"]["step_seconds"] for each in result["layouts"]]
    assert times == sorted(times) and 0 < result["fitting"] < result["legal"]
    again = dense(capsys, "--nodes", "2", *result["layouts"][0]["settings"])
    assert again["time"]["step_seconds"] == pytest.approx(times[0]) and again["verdict"]["fits"]
    assert any(sentence.startswith("other degrees") for sentence in result["why"])


def test_a_dense_layout_that_does_not_fit_is_told_the_nearest_that_do(capsys):
    settings = ["tp=1", "micro_batch=8"]
    verdict = dense(capsys, *settings, code=1)["verdict"]
    assert verdict["nearest"]
    for near in verdict["nearest"]:
        again = dense(capsys, *settings, *near["settings"])["verdict"]
        assert again["fits"] and again["most_bytes"] == near["most_bytes"]
    assert main([*DENSE, "seq_len=2000000", "global_batch=1", "--search"]) == 1
    assert "smaller seq_len" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, words", [
    (["tp=3"], "8 GPUs do not divide by tp x pp x cp"), (["dp=3"], "dp is 3, but 8 GPUs"),
    (["--nodes", "3"], "global_batch=516 is the nearest"), (["layers=0"], "layers is 0, but must be at least 1"),
    (["kv_heads=-1"], "kv_heads is -1"), (["ttp=1"], "did you mean tp?"), (["pp=3"], "8 GPUs do not divide"),
    (["pp=2", "zero=2"], "zero=2 does not go with pp=2"), (["vpp=2"], "vpp is 2, but without a pipeline"),
    (["recompute=some"], "recompute 'some'"), (["--exact"], "--exact is for a GRN model"),
    (["--config", "configs/runs/grn_8b.yaml"], "give one of them"),
    (["--dense", "absent.yaml"], "--dense: cannot read"),
    (["seq_len=8191", "cp=2"], "seq_len (8191) must be a multiple of cp"),
    (["tp=4", "pp=2", "vpp=2", "global_batch=7"], "7 micro-batches"), (["pp=4", "layers=33"], "or at most 2 fewer"),
    (["--gpu", "A100", "precision=fp8"], "no FP8"), (["precision=int4"], "must be bf16 or fp8"),
    (["--network", "0"], "--network is 0.0")])
def test_a_bad_dense_run_is_refused_with_a_remedy(capsys, arguments, words):
    assert main([*DENSE, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_every_layout_of_the_search_is_legal_and_its_settings_make_it():
    config = load_config("configs/runs/grn_8b.yaml", [])
    layouts = list(legal_layouts(config, 64, 8))
    assert {layout.config.parallel.pipeline for layout in layouts} == {1, 2, 4}
    assert min(layout.distance for layout in layouts) == 0
    for layout in layouts[::17]:
        made = load_config("configs/runs/grn_8b.yaml", list(layout.settings))
        assert changed(made, layout.config) == ()


def test_more_memory_never_leaves_fewer_layouts():
    config = load_config("configs/runs/grn_8b.yaml", [])
    small, large = (ranked(config, find_machine(config, gpu, 16, 8))[0] for gpu in ("A100-40GB", "A100-80GB"))
    assert len(small) < len(large) and small[0].seconds >= large[0].seconds


def test_times_follow_the_closed_forms():
    def timed(*settings: str):
        config = load_config("configs/runs/grn_8b.yaml", ["parallel.context=1", "parallel.tensor=8", "zero.stage=1",
                                                          *settings])
        return step_time(config, find_machine(config, "H100", 32, 8))

    none, full = timed(), timed("parallel.recompute=full")
    # a fourth forward pass beside one forward and two backward
    assert full.parts["matrix products"] == pytest.approx(4 / 3 * none.parts["matrix products"], rel=0.02)
    assert full.flops == none.flops and full.hardware_flops > none.hardware_flops
    # Narayanan et al. 2021: the bubble is (p - 1) / (v m) of the rest; here 8 packs for each of 8 replicas
    piped, interleaved = (timed("parallel.pipeline=4", *more) for more in ((), ("parallel.virtual_pipeline=3",)))
    work = sum(piped.parts[name] for name in ("matrix products", "attention", "element-wise", "tensor", "pipeline"))
    assert piped.parts["bubble"] == pytest.approx(3 / 8 * work, rel=0.03)
    assert interleaved.parts["bubble"] == pytest.approx(piped.parts["bubble"] / 3, rel=0.03)
    # twice the packs take twice the time, but for the update
    doubled = timed("data.packs_per_step=128")
    assert doubled.parts["attention"] == pytest.approx(2 * none.parts["attention"])
    assert doubled.parts["optimizer"] == none.parts["optimizer"]


def test_zero_1_waits_for_a_whole_reduction_in_fp32():
    config = load_config("configs/runs/grn_8b.yaml", ["parallel.context=1", "parallel.tensor=8", "zero.stage=1"])
    machine = find_machine(config, "H100", 32, 8)
    # 2 (R - 1) / R of fp32 gradients and (R - 1) / R of bf16 weights, R = 32; one card for each GPU of a node
    weights = 7_890_859_520 / 8
    card = machine.group(32, 8).bandwidth
    ideal = 31 / 32 * (2 * 4 + 2) * weights / card
    assert ideal < step_time(config, machine).parts["ZeRO"] < 1.1 * ideal

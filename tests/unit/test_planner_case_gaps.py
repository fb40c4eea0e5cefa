"""Published cases with gaps and odd values: all that state layers, hidden size, sequence and GPUs are judged."""

import json
import math
import random
from pathlib import Path

import pytest

from grn_scale.planning.case_file import read_cases
from grn_scale.planning.case_gpu import case_gpu
from grn_scale.planning.cases import complete_case
from grn_scale.planning.fitting import errors, judged
from grn_scale.planning.hardware import load_efficiencies
from grn_scale.planning.validate import THROUGHPUT, judge, judge_case, spearman, throughput_field

ROOT = Path(__file__).resolve().parents[2]
REACHED = load_efficiencies()
CASES = {case["name"]: case for case in read_cases(ROOT / "docs/benchmarks/published_runs.json")}
NEEDED = ("layers", "hidden", "seq_len", "n_gpus")
WHOLE = [case for case in CASES.values() if all(case[name] for name in NEEDED)]
LLAMA = CASES["mbridge-25.11-h100-fp8-llama3-70B"]
ODD = {"gpu": ("8x NVIDIA H100 SXM5 80GB", "TPU v4", "Wafer 9", "V100", "MI300X", "RTX 4090", "GB300", "A100"),
       "n_gpus": (1, 7, 12, 1000), "tp": (3, 16), "pp": (5, 64), "cp": (3,), "dp": (7,), "heads": (7, 30),
       "kv_heads": (3,), "global_batch": (1, 13), "micro_batch": (3, 64), "precision": ("fp8", "FP16", "tf32"),
       "recompute": ("none", "something else", "block 4 layers"), "zero_stage": (0, 3), "vpp": (7,),
       "ulysses": (True, 3), "sharding": ("FSDP", "HSDP + TP"), "params_b": (0.01, 5000.0),
       "notes": ("MoE, 8 experts, 2 active", "offload"), "source": ("a blog",)}


def judged_well(case):
    rows = judge_case(case, REACHED)
    assert rows
    for row in rows:
        assert "skipped" not in row, row
        assert math.isfinite(row["predicted"]) and row["predicted"] > 0 and math.isfinite(row["error"])
    return rows


def read(tmp_path, **fields):
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": [LLAMA | fields]}))
    return read_cases(file)[0]


@pytest.mark.parametrize("odd", [False, True])
def test_whatever_else_is_missing_or_odd_a_case_is_judged(odd):
    for number, case in enumerate(WHOLE):
        draw = random.Random(f"{case['name']} {odd}")
        figures = [name for name in (*THROUGHPUT, "memory_gb") if case[name] is not None]
        if not figures:
            continue
        kept = {"name", "source", *NEEDED, draw.choice(figures)}
        share = (0.2, 0.5, 0.8, 1.0)[number % 4]
        made = {name: value if name in kept or draw.random() > share else None for name, value in case.items()}
        if "memory_gb" in kept:
            made["memory_kind"] = case["memory_kind"]
        if odd:
            made |= {name: draw.choice(ODD[name]) for name in draw.sample(sorted(ODD), 3)}
        judged_well(made)


def test_a_bare_case_needs_no_other_key():
    bare = {"name": "bare", "layers": 24, "hidden": 2048, "seq_len": 2048, "n_gpus": 8}
    for field, value in (("step_time_s", 1.0), ("hfu", 0.4), ("mfu", 0.4), ("memory_gb", 40)):
        row, = judged_well(bare | {field: value})
        assert row["source"] == "no source" and {"gpu", "micro_batch", "global_batch"} <= set(row["assumed"])


def test_a_step_without_a_batch_has_an_assumed_one():
    row, = judged_well({**CASES["alst-llama8B-base-8gpu"], "measured_tflops_per_gpu": None, "global_batch": None})
    assert row["quantity"] == "step_time_s" and "micro-batches for each" in row["assumed"]["global_batch"]


@pytest.mark.parametrize("text, name, said", [
    ("8x NVIDIA H100 SXM5 80GB", "H100", None), ("H100 NVL", "H100-NVL", "data sheet"), ("A800 80GB", "A800", "A100"),
    ("NVIDIA H20", "H20", "of H100"), ("H200", "H200", None), ("Tesla V100-SXM2-32GB", "V100-32GB", "A100"),
    ("AMD MI250X", "MI250X", "A100"), ("MI300X", "MI300X", "H100"), ("TPU v5p", "TPU-v5p", "A100"),
    ("Gaudi2", "Gaudi2", "H100"), ("L40", "L40", "L40S"), ("L40S", "L40S", None), ("RTX A6000", "A6000", "PCIe"),
    ("GB300", "GB300", "GB200"), ("B300", "B300", "B200"), ("Ascend 910", "H100", "is not known")])
def test_accelerators_of_cases_are_found_or_named_as_assumed(text, name, said):
    gpu, why = case_gpu({"gpu": text})
    assert gpu.name == name
    assert why is None if said is None else said in why
    judged_well(LLAMA | {"gpu": text, "notes": None})


def test_fp8_is_bf16_where_the_gpu_has_none():
    row, *_ = judged_well(LLAMA | {"gpu": "A100", "notes": "MFU of the fp8 peak"})
    assert "A100-80GB has no FP8" in row["assumed"]["software"]


def test_degrees_that_do_not_go_with_the_gpus_are_named():
    row, *_ = judged_well(LLAMA | {"n_gpus": 12, "tp": 8, "pp": 1, "cp": 1, "dp": None})
    assert row["assumed"]["n_gpus"] == "8: the degrees do not divide 12 GPUs"
    case = LLAMA | {"n_gpus": None, "tp": 4, "pp": 8, "cp": 1, "dp": 2, "ulysses": None}
    assert complete_case(case, REACHED).layout.gpus == 64


def test_key_value_heads_that_do_not_divide_the_heads_become_a_number_that_does():
    done = complete_case(LLAMA | {"heads": 64, "kv_heads": 12}, REACHED)
    assert done.shape.kv_heads == 4 and "do not divide" in done.assumed["kv_heads"]


def test_states_only_of_a_case_without_a_parameter_count_are_those_of_its_shape():
    case = LLAMA | {"params_b": None, "zero_stage": None, "memory_gb": 20, "memory_kind": "model states only"}
    rows = judged_well(case)
    assert rows[-1]["quantity"] == "memory_gb" and "zero_stage" in rows[-1]["assumed"]


def test_values_are_read_as_they_are_meant(tmp_path):
    case = read(tmp_path, n_gpus="1,024", hidden="8192", tp="null", gpu="n/a", mfu="41%", hfu=52.5, zero_stage="1",
                causal="True", sp="", recompute=True, layers=80.0, notes=None, vocab="unknown")
    assert (case["n_gpus"], case["hidden"], case["tp"], case["gpu"], case["mfu"]) == (1024, 8192, None, None, 0.41)
    assert (case["hfu"], case["zero_stage"], case["causal"], case["sp"]) == (0.525, 1, True, None)
    assert case["recompute"] == "full" and isinstance(case["layers"], int) and case["vocab"] is None
    assert throughput_field(case)
    judged_well(case)


@pytest.mark.parametrize("field, value, meant", [
    ("global_batch", "512 sequences", 512), ("global_batch", "4M tokens", 977), ("seq_len", "8k tokens", 8192),
    ("tokens_per_s_per_gpu", "9k tok/s/GPU", 9000), ("step_time_s", "830 ms", 0.83), ("step_time_s", "2 min", 120),
    ("step_time_s", "30 s/step", 30), ("measured_tflops_per_gpu", "0.41 PFLOP/s", 410), ("mfu", "52.1% (bf16)", 0.521),
    ("measured_tflops_per_gpu", "412 TFLOP/s per GPU", 412), ("memory_gb", "1024 MiB", 1), ("zero_stage", "ZeRO 2", 2),
    ("params_b", "70B", 70), ("step_time_s", "3 furlongs", None), ("mfu", "38-43%", None)])
def test_units_are_read(tmp_path, field, value, meant):
    case = read(tmp_path, **{"seq_len": 4096, field: value})
    assert case[field] == (pytest.approx(meant, rel=0.04) if meant else None)
    assert (field in case["unread"]) == (meant is None)


def test_a_field_that_no_case_has_is_named(tmp_path):
    case = read(tmp_path, num_layers=80, layers=None)
    assert "num_layers: is no field of a case" in judge_case(case, REACHED)[0]["skipped"]


@pytest.mark.parametrize("field, value, reason", [
    ("tp", 0, "0 is not above 0"), ("vocab", "many", "'many' is no number"), ("mfu", "high", "'high' is no number"),
    ("ulysses", "x", "'x' is no number"), ("zero_stage", 4, "4 is none of the stages 0 to 3"),
    ("causal", "maybe", "'maybe' is neither true nor false"), ("heads", 2.5, "2.5 is no whole number"),
    ("pp", [1, 2], "[1, 2] is no number"), ("dp", "Infinity", "'Infinity' is no number")])
def test_a_value_that_cannot_be_costs_itself_and_is_named(tmp_path, field, value, reason):
    row = judged_well(read(tmp_path, **{field: value}))[0]
    assert reason in row["assumed"][field] or field == "mfu"
    assert read(tmp_path, **{field: value})["unread"] == {field: reason}


def test_a_case_without_its_numbers_is_skipped_and_the_others_are_judged(tmp_path):
    (tmp_path / "cases.json").write_text(json.dumps({"cases": [
        7, {"layers": "several", "hidden": 8, "seq_len": 8, "n_gpus": 8, "mfu": 0.4}, LLAMA]}))
    rows = judge(read_cases(tmp_path / "cases.json"), REACHED)["cases"]
    assert [row["name"] for row in rows][:2] == ["case 1", "case 2"] and "predicted" in rows[-1]
    assert "7 is no object" in rows[0]["skipped"] and "layers not stated" in rows[1]["skipped"]


def test_whatever_stands_in_a_case_it_is_judged_and_its_row_is_json(tmp_path):
    draw, names = random.Random(5), [name for name in LLAMA if name not in ("name", "layers", "hidden", "seq_len")]
    values = [None, 0, -1, 1, 3, 7, 1000, 1e6, 1e12, 1.5, "abc", "~8", "64 GB", True, False, [1, 2], {"a": 1}, "",
              float("nan"), "TPU v5p", "RTX 4090", "mxfp4", "FSDP + TP", "zero-3", "offload deepspeed", "8K", "é" * 300]
    cases = [LLAMA | {draw.choice(names): draw.choice(values) for _ in range(draw.randint(1, 6))} | {
        "name": str(number), "n_gpus": draw.choice([1, 7, 64, 16384]), "step_time_s": 1.0} for number in range(200)]
    (tmp_path / "cases.json").write_text(json.dumps({"cases": cases}))
    document = judge(read_cases(tmp_path / "cases.json"), REACHED)
    json.dumps(document, allow_nan=False)
    speeds = [row for row in document["cases"] if row["quantity"] != "memory_gb"]
    assert len(speeds) == 200 and all(row["predicted"] > 0 for row in speeds)


def test_a_gpu_not_stated_is_told_by_the_name_or_by_two_figures():
    assert case_gpu({"name": "run-a100", "source": "arXiv 2402.15627"})[0].name == "A100-80GB"
    gpu, why = case_gpu({"name": "run", "measured_tflops_per_gpu": 156, "mfu": 0.5})
    assert gpu.name == "A100-80GB" and "over MFU" in why
    assert case_gpu({"name": "run", "measured_tflops_per_gpu": 200, "mfu": 0.5})[0].name == "H100"


def test_sharding_and_precision_not_stated_are_told_by_the_name():
    case = CASES["torchtitan-8B-8gpu-fsdp-compile-fp8"] | {"sharding": None, "zero_stage": None, "precision": None}
    done = complete_case(case, REACHED)
    assert done.layout.fsdp and done.layout.zero == 3 and done.software.fp8
    case = CASES["zero3-a100-174.6B-384gpu"] | {"sharding": None, "zero_stage": None}
    assert complete_case(case, REACHED).layout.zero == 3


def test_the_first_published_figure_is_judged_and_two_of_them_tell_the_batch():
    case = CASES["megascale-175B-1024gpu"]
    rate = complete_case(case, REACHED)
    seconds = judge_case(case | {"tokens_per_s_per_gpu": None, "step_time_s": 1.0}, REACHED)[0]["predicted"]
    both = case | {"tokens_per_s_per_gpu": None, "step_time_s": seconds, "global_batch": None}
    assert throughput_field(both) == "step_time_s" and both["measured_tflops_per_gpu"]
    done = complete_case(both, REACHED)
    assert done.layout.global_batch == pytest.approx(rate.layout.global_batch, rel=0.15)
    assert "published rate" in done.assumed["global_batch"]
    flops = judge_case(case | {"tokens_per_s_per_gpu": None, "step_time_s": None}, REACHED)[0]
    error = judge_case(both, REACHED)[0]["error"]
    assert 1 / (1 + error) == pytest.approx(1 + flops["error"], rel=0.02)


def test_figures_with_a_letter_or_in_other_units_are_read(tmp_path):
    case = read(tmp_path, seq_len="8K", params_b="70B", vocab="128k", zero_stage="ZeRO-3", memory_kind=None,
                recompute=["mlp", "core_attn"], memory_gb="40 GiB")
    assert (case["seq_len"], case["params_b"], case["vocab"], case["zero_stage"]) == (8192, 70, 128000, 3)
    assert case["recompute"] == "core_attn, mlp" and case["memory_gb"] == 40 and "GiB" in case["memory_kind"]
    assert read(tmp_path, params_b=405e9)["params_b"] == 405
    assert read(tmp_path, recompute=[])["recompute"] == "none" and not case["unread"]


@pytest.mark.parametrize("sharding, zero, fsdp", [
    ("DeepSpeed ZeRO-3", 3, False), ("ZeRO Stage 3", 3, False), ("zero3", 3, False), ("ZeRO-2", 2, False),
    ("HSDP", 3, True), ("Fully Sharded Data Parallel", 3, True), ("FSDP FULL_SHARD", 3, True), ("some", 1, False)])
def test_sharding_is_read_as_it_is_meant(sharding, zero, fsdp):
    done = complete_case(LLAMA | {"sharding": sharding, "zero_stage": None, "pp": None}, REACHED)
    assert (done.layout.zero, done.layout.fsdp) == (zero, fsdp) and "zero_stage" in done.assumed


def test_what_the_model_does_not_have_is_named():
    done = complete_case(LLAMA | {"precision": None, "name": "run"}, REACHED)
    assert done.assumed["precision"] == "bf16: not stated" and not done.software.fp8
    assert "bf16" in complete_case(LLAMA | {"precision": "tf32"}, REACHED).assumed["precision"]
    done = complete_case(LLAMA | {"notes": "MoE with 64 experts and a sliding window"}, REACHED)
    assert done.assumed["model"] == "dense: a mixture of experts and attention in windows is not modelled"
    video, bert = ({"causal": False, "vocab": None, "notes": words} for words in ("a video DiT", "BERT-large"))
    assert complete_case(LLAMA | video, REACHED).software.diffusion
    assert not complete_case(LLAMA | bert, REACHED).software.diffusion


def test_stages_may_have_a_layer_less_at_the_ends():
    llama = {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocab": 128256,
             "seq_len": 8192, "causal": True, "n_gpus": 8192, "gpu": "H100", "name": "405B", "source": "a blog",
             "measured_tflops_per_gpu": 400}
    done = complete_case(llama, REACHED)
    assert done.layout.pp > 2 and "too much" not in done.assumed["pp"]
    assert abs(judge_case(llama, REACHED)[0]["error"]) < 0.15


def test_cases_of_one_name_are_counted_and_fitted_apart():
    document = judge([LLAMA, LLAMA | {"n_gpus": 128, "dp": None}], REACHED)
    assert document["summary"]["counts"]["cases"] == 2
    assert len(errors(judged([LLAMA, LLAMA], REACHED), REACHED)) == 2
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == 0.8

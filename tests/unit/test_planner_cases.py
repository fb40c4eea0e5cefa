"""Published runs as the planner reads them, and how well it predicts those that ship with the project."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grn_scale.errors import EXIT_USAGE, UserError
from grn_scale.planning.case_file import read_cases
from grn_scale.planning.case_text import own_hardware, peak, published_in, recompute, software
from grn_scale.planning.cases import NotJudged, complete_case
from grn_scale.planning.fitting import START, fit, fitted_file, judged, with_values
from grn_scale.planning.flops import Convention, counted, read_convention
from grn_scale.planning.hardware import load_efficiencies, load_gpu
from grn_scale.planning.shape import Shape
from grn_scale.planning.validate import judge, judge_case, spearman
from grn_scale.tools.plan_validate import main

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "docs/benchmarks/published_runs.json"
REACHED = load_efficiencies()
CASES = {case["name"]: case for case in read_cases(PUBLISHED)}
LLAMA = CASES["mbridge-25.11-h100-fp8-llama3-70B"]


@pytest.fixture(scope="module")
def document():
    return judge(list(CASES.values()), REACHED)


def changed(case, **fields):
    return copy.deepcopy(case) | fields


def test_published_runs_are_predicted_within_the_bounds(document):
    summary = document["summary"]
    assert summary["counts"]["throughput"] >= 90
    assert summary["throughput"]["median"] <= 0.10 and summary["throughput"]["p90"] <= 0.20
    assert summary["throughput"]["within_30"] >= 0.95
    assert summary["memory"]["median"] <= 0.10
    assert sorted(summary["order"].values())[1] >= 0.79 and min(summary["order"].values()) >= 0.6


def test_runs_that_nothing_was_fitted_on_are_predicted_where_they_are_tuned():
    document = judge(read_cases(ROOT / "docs/benchmarks/unseen_runs.json"), REACHED)
    assert document["summary"]["counts"]["skipped"] == 0
    tuned = [abs(row["error"]) for row in document["cases"] if row["source"].startswith("NeMo")]
    assert len(tuned) == 18 and max(tuned) <= 0.25


def test_a_case_has_one_row_of_throughput_and_one_of_memory(document):
    rows = [row for row in document["cases"] if row["name"] == "torchtitan-8B-8gpu-fsdp"]
    assert [row["quantity"] for row in rows] == ["tokens_per_s_per_gpu", "memory_gb"]
    assert {row["name"] for row in document["cases"]} == set(CASES)
    for row in document["cases"]:
        if "skipped" in row:
            assert row["skipped"]
        else:
            assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1)
            assert {"name", "source", "quantity", "published", "predicted", "convention", "assumed"} <= set(row)


def test_no_case_with_layers_hidden_sequence_and_gpus_is_skipped(document):
    for row in document["cases"]:
        if "skipped" in row:
            case = CASES[row["name"]]
            assert None in (case["layers"], case["hidden"], case["seq_len"], case["n_gpus"])
            assert "not stated" in row["skipped"]


@pytest.mark.parametrize("missing", [
    ("micro_batch",), ("global_batch",), ("tp", "pp", "dp"), ("dp",), ("ffn", "heads", "kv_heads", "vocab"), ("vpp",),
    ("params_b",), ("recompute",), ("gpu",), ("precision",), ("flops_convention",), ("zero_stage", "sharding"),
    ("causal",), ("cp",), ("micro_batch", "global_batch", "tp", "pp", "dp", "cp", "gpu", "params_b", "notes")])
def test_what_is_missing_is_filled_in_and_named(missing):
    for name in ("mbridge-25.11-h100-fp8-llama3-70B", "ptdp-a100-39.1B", "torchtitan-405B-512gpu-4d-cp2",
                 "wan2.1-14B-b200-mcore", "fpdt-llama3-8B-ul-z3"):
        case = changed(CASES[name], **dict.fromkeys(missing))
        row, *_ = judge_case(case, REACHED)
        assert row["predicted"] > 0
        named = " ".join(row["assumed"])
        for field in set(missing) - {"params_b", "notes", "precision", "sharding", "flops_convention"}:
            assert field in named or (field == "cp" and case.get("ulysses"))


def test_a_filled_layout_uses_all_gpus():
    case = changed(CASES["megatron-h100-strong-177B-1152gpu"])
    layout = complete_case(case, REACHED).layout
    assert layout.gpus == 1152 and layout.tp == 8 and layout.pp > 1
    for case in CASES.values():
        if None not in (case["layers"], case["hidden"], case["seq_len"], case["n_gpus"]):
            assert complete_case(case, REACHED).layout.gpus == case["n_gpus"], case["name"]


def test_dates_and_words_choose_the_software():
    a100, h100 = load_gpu("A100-80GB"), load_gpu("H100")
    old, why = software(CASES["ptdp-a100-7.5B"], a100)
    assert (old.attention, old.overlap, old.dropout) == ("unfused", False, True) and "2023" in why
    assert software(CASES["megascale-175B-1024gpu"], a100)[0].overlap
    assert not software(CASES["megatron-175B-1024gpu"], a100)[0].overlap
    assert software(CASES["mosaic-h100-mpt7b-32768-8gpu"], h100)[0].attention == "fa1"
    new, _ = software(LLAMA, h100)
    assert (new.attention, new.fp8, new.fused) == ("cudnn", True, True)


def test_hardware_of_its_own_is_read_from_the_notes():
    gpu, watts, said = own_hardware(load_gpu("H100"), "h100 sxm 96gb hbm2e 2.4tb/s, 500w power limit")
    assert (gpu.memory_gib, gpu.bandwidth, watts, len(said)) == (96, 2.4e12, 500, 3)


def test_precision_and_sharding_are_read_from_words():
    def layout(**fields):
        return complete_case(changed(LLAMA, **fields), REACHED)

    assert layout(precision="float8 rowwise").software.fp8 and not layout(precision="bf16 (no fp8)").software.fp8
    assert layout(sharding="FSDP SHARD_GRAD_OP", zero_stage=None).layout.zero == 2
    assert layout(sharding="DDP", zero_stage=None, source="x", notes=None).layout.zero == 0
    assert not layout(sharding="DeepSpeed ZeRO-2", notes="no offload used").layout.offload_optimizer
    assert layout(sharding="DeepSpeed ZeRO-2", notes="CPU offload").layout.offload_optimizer


def test_mfu_is_of_the_peak_that_the_words_name():
    h100 = load_gpu("H100")
    for place in ("notes", "flops_convention"):
        assert peak({place: "MFU relative to the FP8 peak 1979 TFLOPS"}, h100) == h100.fp8
    assert peak({"notes": "fp8 linear layers"}, h100) == h100.bf16


def test_memory_of_a_node_or_of_the_data_sheet_is_none_of_its_own():
    for text in ("each node has 640 gb hbm", "h100 80 gb hbm3"):
        assert own_hardware(load_gpu("H100"), text)[2] == []


def test_a_source_without_an_arxiv_number_may_name_its_year():
    assert published_in({"source": "a blog of 2021"}) == (2021, 6) and published_in({"source": "docs, 2024"}) is None
    assert published_in({"source": "arXiv 2104.04473, in 2022"}) == (2021, 4)


def test_an_optimizer_is_sharded_where_it_could_not_have_fit_otherwise():
    whole = CASES["ptd-a100-174.6B-384gpu"]
    assert complete_case(changed(whole, zero_stage=None, sharding=None), REACHED).layout.zero == 0
    tight = changed(whole, zero_stage=None, sharding=None, tp=8, pp=2, vpp=None, dp=24)
    done = complete_case(tight, REACHED)
    assert done.layout.zero == 1 and "would not fit" in done.assumed["zero_stage"]


def test_a_network_in_the_notes_is_no_memory_bandwidth():
    assert own_hardware(load_gpu("H100"), "8 x 400 gb/s infiniband, 3.2 tb/s a node")[2] == []


def test_a_case_states_its_network_and_nodes(tmp_path):
    plain = tmp_path / "cases.json"
    plain.write_text(json.dumps({"cases": [{**LLAMA, "network_gbits": "100", "gpus_per_node": 4}, LLAMA]}))
    stated, usual = (complete_case(case, REACHED).machine.gpu for case in read_cases(plain))
    assert (stated.nic, stated.domain) == (12.5e9, 4)
    assert (usual.nic, usual.domain) == (load_gpu("H100").nic, load_gpu("H100").domain)


def test_sharded_runs_are_split_further_only_where_they_could_not_have_fit():
    large = complete_case(changed(CASES["torchtitan-405B-512gpu-4d-cp2"], tp=None, dp=None), REACHED)
    assert large.layout.tp > 1 and "the fastest that fits" in large.assumed["tp"]
    small = complete_case(changed(CASES["torchtitan-8B-8gpu-fsdp"], tp=None, pp=None, dp=None), REACHED)
    assert (small.layout.tp, small.layout.pp, small.layout.dp) == (1, 1, 8)


def test_a_batch_that_is_not_stated_is_one_that_people_take():
    gap = dict.fromkeys(("global_batch", "micro_batch", "dp"))
    wide = complete_case(changed(CASES["zero3-a100-174.6B-1536gpu"], **gap), REACHED).layout
    assert (wide.micro_batch, wide.global_batch) == (1, 1536)  # 3.1 million tokens
    piped = complete_case(changed(CASES["torchtitan-405B-512gpu-1f1b"], **gap), REACHED).layout
    assert piped.micro_batches == piped.pp


@pytest.mark.parametrize("text, found", [
    (None, None), ("none", ("none", 1.0)), ("full", ("full", 1.0)), ("selective (attention core)", ("selective", 1.0)),
    ("selective (per-op SAC)", ("operators", 1.0)), ("75% of layers checkpointed", ("full", 0.75)),
    ("none in the recipe", ("none", 1.0)), ("selective (norms)", ("none", 1.0)), ("Off", ("none", 1.0)),
    ("not used", ("none", 1.0)), ("disabled", ("none", 1.0)), ("0", ("none", 1.0)), ("mlp", ("operators", 1.0)),
    ("core_attn", ("selective", 1.0)), ("nothing but the 8 first blocks", ("full", 1.0)),
    ("recompute_granularity=selective", ("selective", 1.0)), ("attention only", ("selective", 1.0)),
    ("8 of 32 layers", ("full", 0.25)), ("every other layer", ("full", 0.5)), ("in their own words", None)])
def test_recomputation_is_read_from_words(text, found):
    assert recompute(text) == found


@pytest.mark.parametrize("text, found", [
    ("Megatron model FLOPs (full, un-halved attention term)", Convention()),
    ("causal attention HALVED, non-embedding parameters", Convention(halved=True)),
    ("HARDWARE FLOPs incl. recompute: F=96*B*s*l*h^2*(1+s/(6h)+V/(16lh))", Convention(hardware=True)),
    ("6*s*N + 12*L*h*s^2 (attention not halved for causal)", Convention(embedding=True)),
    ("about 6N per token; no visible quadratic attention term", Convention(quadratic=False, embedding=True)),
    ("6ND", Convention(quadratic=False, embedding=True)), ("PaLM: 6N + 12LHQT", Convention(embedding=True)),
    ("6*N*D, attention not counted", Convention(quadratic=False, embedding=True)),
    ("model FLOPs, causal attention counted half", Convention(halved=True)),
    ("attention FLOPs divided by two", Convention(halved=True)), ("not causal-halved", Convention()),
    ("HFU-type", Convention(hardware=True)), ("model FLOPs, not hardware FLOPs", Convention()),
    ("model FLOPs over the hardware peak of 989", Convention()),
    ("model FLOPs, excluding recompute", Convention()), ("model FLOPs, no recomputation", Convention()),
    ("model FLOPs of the half-precision peak", Convention())])
def test_conventions_are_read_from_words(text, found):
    assert read_convention(text) == read_convention(text, rate=True) == (found, None)


def test_a_convention_that_is_not_stated_is_that_of_most_who_print_flops_a_second():
    assert read_convention(None, rate=True)[0] == Convention() and read_convention(None)[0] == Convention(halved=True)
    assert read_convention("in their own words")[0] == Convention(halved=True)
    row, = judge_case(changed(LLAMA, flops_convention=None, measured_tflops_per_gpu=400, tokens_per_s_per_gpu=None,
                              mfu=None), REACHED)
    assert "whole attention" in row["assumed"]["flops_convention"]


def test_conventions_count_what_their_formulas_count():
    layers, h, s, vocab = 24, 2304, 2048, 51200
    shape = Shape(layers, h, 24, 24, 4 * h, False, vocab, True, True, s)
    hardware = 96 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert counted(shape, Convention(hardware=True)) == pytest.approx(hardware)
    model = 72 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (12 * layers * h))
    assert counted(shape, Convention()) == pytest.approx(model)
    chinchilla = 6 * s * shape.parameters + 12 * layers * h * s**2
    assert counted(shape, Convention(embedding=True)) == pytest.approx(chinchilla)
    half = counted(shape, Convention()) - counted(shape, Convention(halved=True))
    assert half == pytest.approx(6 * layers * h * s**2)


@pytest.mark.parametrize("case, gflop_per_token", [("mcore-fp8-llama3-8B", 57.9),
                                                   ("mbridge-25.11-h100-fp8-llama3-8B", 51.5),
                                                   ("automodel-h100-bf16-llama3-70B", 449)])
def test_flops_a_token_are_those_that_sources_print(case, gflop_per_token):
    shape = complete_case(CASES[case], REACHED).shape
    convention, _ = read_convention(CASES[case]["flops_convention"])
    assert counted(shape, convention) / shape.sequence / 1e9 == pytest.approx(gflop_per_token, rel=0.02)


def test_a_step_converts_to_each_quantity():
    case = changed(CASES["automodel-h100-bf16-llama3-70B"], hfu=None)
    names = ("tokens_per_s_per_gpu", "step_time_s", "measured_tflops_per_gpu", "mfu")
    rows = {}
    for name in names:
        row, = judge_case(case, REACHED)
        rows[name], case[name] = row["predicted"], None
    assert rows["step_time_s"] == pytest.approx(128 * 8192 / rows["tokens_per_s_per_gpu"] / 64)
    assert rows["mfu"] == pytest.approx(rows["measured_tflops_per_gpu"] / 989)
    only = judge_case(changed(case, hfu=0.5), REACHED)[0]
    assert only["quantity"] == "mfu" and only["predicted"] > rows["mfu"]


def test_cases_that_cannot_be_judged_say_why():
    for fields, reason in (({"layers": None}, "layers not stated"), ({"n_gpus": None, "dp": None}, "number of GPUs")):
        assert reason in judge_case(changed(LLAMA, **fields), REACHED)[0]["skipped"]
    nothing = changed(LLAMA, measured_tflops_per_gpu=None, tokens_per_s_per_gpu=None)
    assert "neither" in judge_case(nothing, REACHED)[0]["skipped"]
    with pytest.raises(NotJudged, match="seq_len"):
        complete_case(changed(LLAMA, seq_len=None), REACHED)


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"), ("[]", "holds no cases"), ('{"cases": [1, null]}', "holds no cases")])
def test_a_file_that_is_not_one_of_cases_is_refused(tmp_path, text, message):
    (tmp_path / "cases.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_cases(tmp_path / "cases.json")


def test_order_is_judged_by_ranks():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 50]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9487, abs=1e-4)
    assert spearman([1, 1], [1, 2]) == 0


def test_a_fit_finds_an_efficiency_again():
    cases = [CASES[name] for name in ("automodel-h100-bf16-llama3-70B", "mosaic-h100-mpt7b-2048-128gpu")]
    truth = with_values(REACHED, {name: start for name, (start, _) in START.items()} | {"matmul.hopper_bf16": 0.6})
    for number, (case, _, done) in enumerate(judged(cases, truth)):
        cases[number] = changed(case, tokens_per_s_per_gpu=judge_case(case, truth)[0]["predicted"])
        assert done.name == case["name"]
    values = fit(cases, REACHED)
    assert values["matmul.hopper_bf16"] < START["matmul.hopper_bf16"][0]
    text = fitted_file(values, ["a"])
    assert "matmul.hopper_bf16: 0.6" in text and "  - a" in text


def test_the_command_prints_json_and_writes_picture_and_report(tmp_path, capsys):
    chosen = [CASES[name] for name in ("ptdp-a100-7.5B", "ptdp-a100-39.1B", "zero-memory-7.5B-stage1", "seaweed-7B")]
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({"cases": chosen}))
    assert main(["--cases", str(file), "--json", "--report", str(tmp_path), "--plot", str(tmp_path / "p.svg")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["summary"]["counts"] == {"cases": 4, "rows": 4, "judged": 3, "throughput": 2, "memory": 1,
                                             "skipped": 1}
    assert json.loads((tmp_path / "planner-validation.json").read_text()) == document
    page = (tmp_path / "planner-validation.md").read_text()
    for said in ("Sources left out", "| global batch | 2 |", "seaweed-7B", "planner-validation.png"):
        assert said in page
    assert (tmp_path / "planner-validation.png").stat().st_size > 1000 and (tmp_path / "p.svg").exists()
    assert main(["--cases", str(file)]) == 0
    assert "skipped: layers" in capsys.readouterr().out


def test_a_missing_folder_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="is no folder") as caught:
        main(["--cases", str(PUBLISHED), "--report", str(tmp_path / "none")])
    assert caught.value.exit_code == EXIT_USAGE
    with pytest.raises(UserError, match="create it first"):
        main(["--cases", str(PUBLISHED), "--plot", str(tmp_path / "none" / "x.png")])


def test_validation_needs_no_torch():
    code = ("import sys; sys.modules['torch'] = None\nfrom grn_scale.tools.plan_validate import main\n"
            f"code = main(['--cases', {str(PUBLISHED)!r}, '--json'])\n"
            "assert not [name for name in sys.modules if name.startswith('torch.')]\nsys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["counts"]["cases"] == len(CASES)


def test_figures_of_the_shipped_report_are_those_of_the_model(document):
    shipped = json.loads((PUBLISHED.parent / "planner-validation.json").read_text())
    for row, again in zip(shipped["cases"], document["cases"], strict=True):
        assert row["name"] == again["name"]
        assert row.get("predicted", 0) == pytest.approx(again.get("predicted", 0), rel=1e-6)


def test_a_slower_link_makes_no_case_faster():
    slow = replace(REACHED, nic=REACHED.nic / 4)
    for name in ("megatron-175B-8192gpu", "zero3-a100-174.6B-1536gpu", "llama3-405B-8192gpu-8192"):
        row, again = judge_case(CASES[name], REACHED)[0], judge_case(CASES[name], slow)[0]
        faster = again["predicted"] < row["predicted"] if row["quantity"] == "step_time_s" else (
            again["predicted"] > row["predicted"])
        assert not faster

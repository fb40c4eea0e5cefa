"""Dry runs of layouts: what one rank of each kind holds, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grn_scale.cli import main
from grn_scale.config.load import load_config, to_dict
from grn_scale.errors import ConfigError, UserError
from grn_scale.model.transformer import GRN
from grn_scale.parallel import dry_run
from grn_scale.parallel.dry_run import check_dry_run
from grn_scale.parallel.fake_world import fake_environment, fake_tensors
from grn_scale.parallel.memory_meter import MemoryMeter, storage_bytes
from grn_scale.planning.grn_activations import KernelForms
from grn_scale.planning.grn_memory import step_memory
from grn_scale.tools.plan_document import console, show_exact
from grn_scale.tools.plan_exact import TOLERANCE, exact_document

ROOT = Path(__file__).resolve().parents[2]
TINY = ("model.hidden_size=64", "model.num_layers=4", "model.num_heads=4", "model.ffn_hidden_size=128",
        "model.text_hidden_size=32", "data.token_budget=512", "data.packs_per_step=8")
OF_8 = (*TINY, "parallel.tensor=2", "parallel.pipeline=2")
REAL = """
import contextlib, json, sys
from grn_scale.config.load import build
from grn_scale.config.schema import Config
from grn_scale.parallel import dry_step, groups

@contextlib.contextmanager
def real_groups(parallel):
    yield groups.start(parallel)

dry_step.fake_groups, dry_step.fake_tensors = real_groups, contextlib.nullcontext
json.dump(dry_step.dry_step(build(Config, json.load(sys.stdin))), sys.stdout)
"""
"""The same measurement on tensors with storage, and in a world that exists."""


def plain_count(config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GRN(config.model).parameters())


@pytest.fixture(scope="module")
def tried():
    """TP2 x PP2 x DP2, to run with libraries that are not here."""
    config = load_config(None, [*OF_8, "kernels.norm=apex", "kernels.adamw=transformer_engine"])
    return config, dry_run.dry_run(config, 8)


def test_the_stages_hold_the_plain_model_exactly(tried):
    config, result = tried
    assert [(each.stage, each.rank, each.ranks) for each in result.classes] == [(0, 0, 4), (1, 4, 4)]
    assert result.parameters == plain_count(config) and result.differences == ()
    layers = {int(name.split(".")[1]) * 2 + int(name.split(".")[3]) for name in result.classes[1].tensors
              if name.startswith("block_chunks")}
    assert layers == {2, 3}


def test_bytes_are_those_of_zero_1_in_bf16(tried):
    for each in tried[1].classes:
        held, count = each.bytes, each.parameters
        # weights bf16, gradients accumulated in fp32, and of masters, two moments and the average a half each
        for name, expected in (("weights", 2 * count), ("gradients", 4 * count), ("optimizer", 12 * count // 2),
                               ("average", 4 * count // 2)):
            assert expected <= held[name] <= expected + 1024, name
        assert held["peak"] >= sum(held.values()) - held["peak"] and held["activations"] > 0
        assert each.micro_batches == 2


def test_a_tensor_that_no_stage_holds_and_one_held_twice_are_named(tried):
    config, result = tried
    first, last = result.classes
    tensors = dict(first.tensors)
    del tensors["word_embed.bias"]
    tensors["text_proj.bias"] *= 2
    total, differences = dry_run._add_up(config.model, [dataclasses.replace(first, tensors=tensors), last])
    assert total == result.parameters
    assert differences == ("word_embed.bias: the stages hold 0 elements, the model has 64",
                           "text_proj.bias: the stages hold 128 elements, the model has 64")


def test_the_result_stands_beside_the_plan_as_a_table_and_as_json(tried, capsys):
    config, result = tried
    result = dataclasses.replace(result, differences=("x: the stages hold 1 elements, the model has 2",))
    planned = step_memory(config, 8, KernelForms.of_dry_run(), result.classes[0].micro_batches)
    values = json.loads(json.dumps(exact_document(result, planned, 3.0)))
    assert values["classes"][1]["tried"]["weights"] == result.classes[1].bytes["weights"]
    assert values["parameters"] == result.parameters and "tensors" not in values["classes"][0]
    assert all(abs(each["errors"]["peak"]) < TOLERANCE for each in values["classes"])
    show_exact(console(), values)
    text = capsys.readouterr().out
    assert f"{result.parameters:,} parameters" in text and f"{result.classes[1].bytes['peak'] / 1e9:.3f}" in text
    assert "differs from the model: x" in text and "…" not in text


def test_a_rank_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"pipeline stage \d \(rank \d of 8\) ended with exit code 1"):
        dry_run.dry_run(load_config(None, OF_8), 8)


@pytest.mark.parametrize("settings, words", [
    (("zero.stage=3",), "zero.stage is 3"),
    (("zero.stage=2", "zero.offload_optimizer=true"), "zero.offload_optimizer is true"),
    (("parallel.tensor=3",), "parallel.tensor is 3, but must divide model.num_heads")])
def test_layouts_that_cannot_be_tried_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_dry_run(load_config(None, [*TINY, *settings]), 8)


def test_the_command_ends_with_2_where_the_layout_is_illegal(capsys):
    exact = ["plan", "--exact", "--gpu", "H100", "--gpus-per-node"]
    assert main([*exact, "6", *OF_8]) == 2
    assert "the job has 6 processes" in capsys.readouterr().err
    assert main([*exact, "8", "--config", "configs/runs/class_b.yaml"]) == 2
    assert "class-to-image model" in capsys.readouterr().err
    assert main([*exact, "8", "zero.stage=3", *TINY]) == 2
    assert "zero.stage is 3" in capsys.readouterr().err


def test_meter_counts_storages_until_they_are_freed_and_views_not_at_all():
    with MemoryMeter() as meter:
        a = torch.zeros(256)
        view = a.view(16, 16).t()
        b = torch.ones(512)
        assert (meter.live, meter.peak) == (3072, 3072)
        del b
        gc.collect()
        assert (meter.live, meter.peak) == (1024, 3072)
        meter.restart_peak()
        del a
        assert (meter.live, meter.peak) == (1024, 1024)
        assert storage_bytes([view, view[0]]) == 1024
        view.untyped_storage().resize_(0)
        view.detach()
        assert meter.live == 0


def test_fake_modules_move_and_fake_numbers_are_harmless():
    apply = torch.nn.Module._apply
    with fake_tensors():
        layer = torch.nn.Linear(1 << 20, 1 << 20)  # 4 TB
        weight = layer.weight
        assert layer.to(torch.float32).weight is weight
        assert layer.to(torch.bfloat16).weight.dtype == torch.bfloat16
        norm = layer.weight.norm()
        assert norm.item() == 1.0 and not bool(norm == math.inf) and int(norm.int()) == 0
    assert torch.nn.Module._apply is apply


@pytest.mark.slow
@pytest.mark.parametrize("settings, gradients", [
    (("zero.stage=0", "train.precision=fp32", "parallel.tensor=2"), 4.0),
    (("zero.stage=1", "train.precision=fp32", "parallel.pipeline=2"), 4.0),
    (("zero.stage=2", "parallel.tensor=2"), 1.0),
    (("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.context=2", "parallel.recompute=full"), 4.0),
    (("parallel.tensor=2", "parallel.context=4", "model.num_heads=18", "model.hidden_size=72"), 4.0)])
def test_other_layouts_of_eight_add_up_too(settings, gradients):
    config = load_config(None, [*TINY, *settings])
    result = dry_run.dry_run(config, 8)
    assert result.parameters == plain_count(config) and result.differences == ()
    for each in result.classes:
        assert each.bytes["gradients"] == pytest.approx(gradients * each.parameters, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("parallel.recompute=selective",), ("train.precision=fp32", "zero.stage=0")])
def test_a_dry_step_holds_what_a_real_one_holds(settings):
    config = load_config(None, [*TINY, *settings])
    environment = fake_environment(0, 1)
    del environment["MASTER_PORT"]  # one process without a launcher
    done = subprocess.run([sys.executable, "-c", REAL], input=json.dumps(to_dict(config)), text=True, cwd=ROOT,
                          stdout=subprocess.PIPE, env=environment, timeout=300, check=True)
    real, (dry,) = json.loads(done.stdout)["bytes"], dry_run.dry_run(config, 1).classes
    for name in ("weights", "gradients", "optimizer", "average", "batches", "activations", "peak"):
        assert dry.bytes[name] == pytest.approx(real[name], rel=0.02), name


@pytest.mark.slow
def test_all_ranks_of_the_8b_model_on_1024_processes_within_a_minute_of_two_cores():
    config = load_config(None, ["model=configs/model/grn_8b.yaml", "parallel.tensor=8", "parallel.pipeline=4",
                                "data.token_budget=16384", "data.packs_per_step=128"])

    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    begin = processor_seconds()
    result = dry_run.dry_run(config, 1024)
    assert processor_seconds() - begin < 2 * 60
    assert result.parameters == 7_890_859_520 and result.differences == ()
    assert [each.ranks for each in result.classes] == [256] * 4

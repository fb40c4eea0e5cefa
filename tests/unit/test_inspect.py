"""What `grn-scale inspect` prints of each form, and the differences it finds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grn_scale.cli import main
from grn_scale.tokenizer.load import fingerprint
from tests.unit.test_convert import shifted, state_of, training_file


@pytest.fixture
def run_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_every_form_of_the_same_weights_has_one_fingerprint(run_json):
    state = state_of("bit_hd28")
    torch.save(state, "grn.pth")
    Path("m.yaml").write_text("{latent_channels: 8, rounds: 4}")
    save_file(state, "grn.safetensors")
    for target in ("native", "hf"):
        run_json("convert", "--input", "grn.pth", "--from", "official", "--to", target, "--output", target,
                 "--layout", "v2", "--model", "m.yaml")
    found = {path: run_json("inspect", path) for path in ("grn.pth", "grn.safetensors", "native", "hf")}
    assert {path: value["form"] for path, value in found.items()} == {
        "grn.pth": "official", "grn.safetensors": "safetensors", "native": "native", "hf": "hf"}
    for value in found.values():
        weights = value["weights"]["raw"]
        assert value["kind"] == "text" and weights["fingerprint"] == fingerprint(state)
        assert weights["parameters"] == sum(tensor.numel() for tensor in state.values())
        assert weights["tensors"]["text_proj.weight"] == {"dtype": "float32", "shape": [56, 32]}
    assert found["native"]["model"]["layout"] == "v2" and found["native"]["step"] == 0


def test_a_training_file_shows_both_sets_and_its_step(run_json, capsys):
    state = state_of("bit_hd28")
    torch.save(training_file(state, shifted(state, 1.0)), "grn.pth")
    found = run_json("inspect", "grn.pth")
    assert found["step"] == 1200 and list(found["weights"]) == ["raw", "ema"]
    assert main(["inspect", "grn.pth"]) == 0
    shown = capsys.readouterr().out
    assert "kind         text (official)" in shown and "step         1200" in shown and "[56, 32]" in shown


def test_tensors_of_no_known_kind_are_still_shown(run_json):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.tensor(1)}, "x.safetensors")
    found = run_json("inspect", "x.safetensors")
    assert found["kind"] is None and found["weights"]["raw"]["dtypes"] == {"bfloat16": 6, "int64": 1}


def test_every_kind_of_difference_is_found(run_json, capsys):
    a = {"same": torch.ones(3), "gone": torch.ones(1), "shape": torch.ones(2), "value": torch.tensor([1.0, 2.0]),
         "dtype": torch.ones(2), "nan": torch.tensor([math.nan, 1.0]), "broken": torch.ones(1),
         "inf": torch.tensor([math.inf, math.inf]), "zero": torch.tensor([0.0])}
    b = {"same": torch.ones(3), "new": torch.ones(1), "shape": torch.ones(2, 1), "value": torch.tensor([1.0, 2.5]),
         "dtype": torch.ones(2).bfloat16(), "nan": torch.tensor([math.nan, 1.0]), "broken": torch.tensor([math.nan]),
         "inf": torch.tensor([math.inf, 0.0]), "zero": torch.tensor([-0.0])}
    save_file(a, "a.safetensors")
    save_file(b, "b.safetensors")
    found = run_json("inspect", "--diff", "a.safetensors", "b.safetensors")
    assert not found["identical"]
    assert found["weights"]["raw"] == {
        "only_a": ["gone"], "only_b": ["new"], "shapes": {"shape": [[2], [2, 1]]},
        "dtypes": {"dtype": ["float32", "bfloat16"]}, "equal": 2,
        "values": {"broken": None, "inf": "infinity", "value": 0.5, "zero": 0.0}}
    assert main(["inspect", "--diff", "a.safetensors", "b.safetensors"]) == 0
    shown = capsys.readouterr().out
    for line in ("they differ", "only in A  gone", "only in B  new", "value: at most 0.5 apart", "broken: NaN in one"):
        assert line in shown


def test_equal_weights_are_identical_whatever_holds_them(run_json):
    state = state_of("bit_hd28")
    torch.save(training_file(state, shifted(state, 1.0)), "both.pth")
    torch.save(state, "flat.pth")
    save_file(state, "flat.safetensors")
    assert run_json("inspect", "--diff", "flat.pth", "flat.safetensors")["identical"]
    found = run_json("inspect", "--diff", "flat.pth", "both.pth")
    assert not found["identical"] and list(found["weights"]) == ["raw", "raw - ema"]
    assert found["weights"]["raw"]["equal"] == len(state) and not found["weights"]["raw"]["values"]
    assert found["weights"]["raw - ema"]["values"]["head.norm.weight"] == pytest.approx(1.0)


@pytest.mark.parametrize("arguments", [[], ["a", "--diff", "b", "c"], ["--diff", "a"], ["a", "b"]])
def test_bad_usage_is_said(arguments, capsys):
    assert main(["inspect", *arguments]) == 2
    assert "error: " in capsys.readouterr().err

"""Weights that a run starts from: which are found, what of them is taken, and what is named."""

import os

import pytest
import torch
from safetensors.torch import save_file

from grn_scale.atomic import write_json
from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.chunks import Chunk
from grn_scale.checkpoint.origin import check_origin, find_origin
from grn_scale.checkpoint.ranks import Ranks
from grn_scale.checkpoint.store import take_chunks
from grn_scale.errors import ConfigError, UserError
from tests.helpers.checkpoints import chunks

MODEL = {"hidden_size": 8}


def tensors(fill=0.0):
    return {"a.weight": torch.arange(24.0).reshape(6, 4) + fill + 1 / 3, "a.bias": torch.arange(6.0) + fill,
            "scale": torch.tensor(0.7 + fill)}


def save(run, step, state=None, **sections):
    return save_checkpoint(run, step, {name: chunks(t) for name, t in sections.items()},
                           {"step": step, "config": {"model": MODEL}, **(state or {})}, keep_last=9)


def origin(path, weights="raw"):
    return find_origin(str(path), weights, Ranks())


def take(found, wanted, partial=False):
    return take_chunks(found.folder, found.index, chunks(wanted), partial=partial)


# --- which weights

def test_a_run_gives_its_newest_complete_checkpoint_and_a_step_folder_itself(tmp_path):
    first, second = (save(tmp_path, step, model=tensors(step), ema=tensors(step + 10)) for step in (1, 2))
    assert origin(tmp_path).path == second and origin(first).path == first
    (second / "COMPLETE").unlink()
    found = origin(tmp_path, "ema")
    assert (found.path, found.weights, found.model) == (first, "ema", MODEL)
    target = {name: torch.zeros_like(t) for name, t in tensors().items()}
    assert take(found, target) == {} and all(torch.equal(target[name], t) for name, t in tensors(11).items())


def test_a_wrong_origin_is_refused_before_any_process_meets_another(tmp_path):
    first = save(tmp_path / "run", 1, model=tensors())
    second = save(tmp_path / "run", 2, model=tensors(), ema=tensors())
    (second / "COMPLETE").unlink()
    for path in (tmp_path / "run", first):
        check_origin(str(path), "raw")
        with pytest.raises(ConfigError, match="holds no ema weights: set init.weights=raw"):
            check_origin(str(path), "ema")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path, said in (("absent", "is not there"), ("file", "convert --to native"), ("empty", "no complete")):
        with pytest.raises(ConfigError, match=f"init.from={tmp_path / path}.*{said}"):
            check_origin(str(tmp_path / path), "raw")
    with pytest.raises(UserError, match="init.from=.*no completion marker.*choose another"):
        check_origin(str(second), "raw")


def test_it_says_where_it_comes_from_and_where_that_came_from(tmp_path):
    before = {"path": "/runs/t2i/step-00000900", "step": 900, "weights": "ema", "origin": None}
    path = save(tmp_path, 3, {"origin": before}, model=tensors())
    assert origin(path).to_dict() == {"path": str(path), "step": 3, "weights": "raw", "origin": before}


def test_a_converted_class_folder_gives_one_set_or_two(tmp_path):
    write_json(tmp_path / "config.json", {"kind": "class_to_image", "model": MODEL})
    save_file(tensors(5), tmp_path / "model.safetensors")
    found = origin(tmp_path).without(["scale"])
    target = {name: torch.zeros_like(t) for name, t in tensors().items() if name != "scale"}
    assert take(found, target) == {} and torch.equal(target["a.weight"], tensors(5)["a.weight"])
    with pytest.raises(ConfigError, match="one set of weights.*init.weights=raw"):
        origin(tmp_path, "ema")
    save_file(tensors(6), tmp_path / "model_raw.safetensors")
    for weights, fill in (("raw", 6), ("ema", 5)):
        assert take(origin(tmp_path, weights), target, partial=True).keys() == {"scale"}
        assert torch.equal(target["a.bias"], tensors(fill)["a.bias"])


def test_what_holds_no_such_weights_is_refused(tmp_path):
    path = save(tmp_path / "run", 1, model=tensors())
    with pytest.raises(ConfigError, match="holds no ema weights: set init.weights=raw"):
        origin(tmp_path / "run", "ema")
    with pytest.raises(ConfigError, match="absent is not there"):
        origin(tmp_path / "absent")
    (tmp_path / "w.pth").touch()
    with pytest.raises(ConfigError, match="is a file: .*convert --to native"):
        origin(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        origin(tmp_path)
    nameless = save_checkpoint(tmp_path / "b", 1, {"model": chunks(tensors())}, {"step": 1}, keep_last=1)
    with pytest.raises(UserError, match="does not say of which model"):
        origin(nameless)
    data = path / "model/rank-00000.safetensors"
    with data.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(UserError, match="init.from=.*checksum"):
        origin(path)


# --- what of them is taken

def test_weights_in_another_dtype_become_what_the_run_keeps_box_by_box(tmp_path):
    stored = {name: t.bfloat16() for name, t in tensors().items()}
    found = origin(save(tmp_path, 1, model=stored))
    columns, bias, scale = torch.zeros(4, 2), torch.zeros(3), torch.zeros(())
    wanted = [Chunk("a.weight", (6, 4), (1, 2), columns), Chunk("a.bias", (6,), (3,), bias),
              Chunk("scale", (), (), scale)]
    assert take_chunks(found.folder, found.index, wanted, partial=False) == {}
    assert torch.equal(columns, stored["a.weight"].float()[1:5, 2:])
    assert torch.equal(bias, stored["a.bias"].float()[3:]) and torch.equal(scale, stored["scale"].float())


def test_every_tensor_that_does_not_fit_is_named_in_both_directions_and_nothing_else_is_taken(tmp_path):
    found = origin(save(tmp_path, 1, model=tensors() | {"count": torch.tensor([3]), "old": torch.zeros(2)}))
    wanted = {"a.weight": torch.full((5, 4), 7.0), "a.bias": torch.full((6,), 7.0), "scale": torch.tensor(7.0),
              "new": torch.full((2,), 7.0), "count": torch.full((1,), 7.0)}
    with pytest.raises(UserError) as refusal:
        take(found, wanted)
    reasons = {"a.weight": "has shape (5, 4) here and (6, 4) there", "new": "is missing in the checkpoint",
               "count": "is float32 here and int64 there", "old": "is in the checkpoint, but nothing here takes it"}
    assert all(f"{name} {reason}" in str(refusal.value) for name, reason in reasons.items())
    assert str(refusal.value).endswith("init.partial=true takes what fits")
    assert "a.bias" not in str(refusal.value) and all((t == 7).all() for t in wanted.values())
    assert take(found, wanted, partial=True) == reasons
    assert torch.equal(wanted["a.bias"], tensors()["a.bias"]) and torch.equal(wanted["scale"], tensors()["scale"])
    assert all((wanted[name] == 7).all() for name in ("a.weight", "new", "count"))

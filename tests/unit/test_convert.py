"""GRN text/video weights of the reference, in every nesting official files have, through every form and back."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grn_scale.atomic import partial_name
from grn_scale.checkpoint import load_weights
from grn_scale.cli import main
from grn_scale.config.load import to_dict
from grn_scale.convert import hf_folder
from grn_scale.model import load_model
from tests.unit import test_model_golden as golden
from tests.unit.test_model_golden import CASES, GOLDEN, golden_config

MODELS = sorted(CASES["models"])


def state_of(name: str) -> dict[str, torch.Tensor]:
    weights = load_file(GOLDEN / "grn_t2iv_state.safetensors")
    return {key.removeprefix(name + "/"): value for key, value in weights.items() if key.startswith(name + "/")}


def shifted(state: dict[str, torch.Tensor], by: float) -> dict[str, torch.Tensor]:
    return {name: tensor + by for name, tensor in state.items()}


def training_file(raw: dict[str, torch.Tensor], ema: dict[str, torch.Tensor] | None) -> dict:
    trainer = {"config": {}, "gpt_fsdp": raw, "gpt_fsdp_opt": None}
    if ema is not None:
        trainer["gpt_ema_fsdp"] = ema
    return {"args": {"lr": 2e-4, "names": ["a"]}, "gpt_training": True, "arch": "GRN0b", "epoch": 3, "iter": 7,
            "g_it": 1200, "trainer": trainer}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Every name, dtype, shape and bit."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        and torch.equal(a[name].contiguous().reshape(-1).view(torch.uint8),
                        b[name].contiguous().reshape(-1).view(torch.uint8)) for name in a)


def load_torch(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture
def convert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(source: str, form: str, target: str, output: str, *more: str) -> int:
        return main(["convert", "--input", source, "--from", form, "--to", target, "--output", output, *more])

    for name, case in CASES["models"].items():
        values = {"latent_channels": case["latent_dim"], "rounds": case["hbq_round"],
                  "label_form": "bit" if case["refine_mode"] == "bit" else "index"}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
    return call


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_flat_file_survives_native_and_hugging_face_bit_for_bit(convert, name, layout):
    state = state_of(name)
    torch.save(state, "grn.pth")
    assert convert("grn.pth", "official", "native", "ckpt/", "--layout", layout, "--model", f"{name}.yaml") == 0
    assert convert("ckpt", "native", "hf", "hf") == 0
    assert convert("hf", "hf", "official", "back.pth") == 0
    assert convert("ckpt/step-00000000", "native", "official", "step.pth") == 0
    for file in ("back.pth", "step.pth"):
        assert same(load_torch(Path(file)), state)
        assert list(load_torch(Path(file))) == list(load_model("ckpt").state_dict())
    expected = golden_config(name, layout)
    for folder in ("ckpt", "ckpt/step-00000000", "hf"):
        config = load_model(folder).config
        assert same(load_weights(folder), state)
        assert (config.task_tags, config.end_fraction) == ((False, 0.999) if layout == "v1" else (True, 0.95))
        assert {**to_dict(config), "task_tags": True, "end_fraction": 0.95} == to_dict(expected)


def test_a_converted_model_gives_the_reference_logits(convert, monkeypatch):
    """The golden test itself, run on what comes out of the conversion."""
    for layout in ("v1", "v2"):
        for case in CASES[layout]:
            name = case.split("/")[0]
            output = f"{layout}-{name}"
            if not Path(output).exists():
                torch.save(training_file(state_of(name), None), "grn.pth")
                assert convert("grn.pth", "official", "hf", output, "--layout", layout, "--model", f"{name}.yaml") == 0
            monkeypatch.setattr(golden, "GRN", lambda config, output=output: load_model(output))
            golden.test_logits_equal_the_reference(layout, case)


def test_a_training_file_keeps_both_sets_and_its_step(convert):
    raw, ema = state_of("bit_hd24"), shifted(state_of("bit_hd24"), 0.25)
    torch.save(training_file(raw, ema), "global_step_1200.pth")
    model = ("--layout", "v2", "--model", "bit_hd24.yaml")
    assert convert("global_step_1200.pth", "official", "native", "run", *model) == 0
    assert Path("run/step-00001200/COMPLETE").exists()
    assert same(load_weights("run"), raw) and same(load_weights("run", ema=True), ema)
    assert convert("run", "native", "official", "both.pth", "--weights", "both") == 0
    back = load_torch(Path("both.pth"))
    assert same(back["trainer"]["gpt_fsdp"], raw) and same(back["trainer"]["gpt_ema_fsdp"], ema)
    assert back["g_it"] == 1200 and back["trainer"]["gpt_fsdp_opt"] is None
    for weights, expected in ((None, ema), ("ema", ema), ("raw", raw)):
        option = ("--weights", weights) if weights else ()
        assert convert("run", "native", "official", f"flat-{weights}.pth", *option) == 0
        assert same(load_torch(Path(f"flat-{weights}.pth")), expected)
        if weights:
            assert convert("global_step_1200.pth", "official", "native", f"run-{weights}", *option, *model) == 0
            assert same(load_weights(f"run-{weights}"), expected)


def test_the_arguments_of_a_training_file_may_be_a_namespace(convert):
    saved = training_file(state_of("bit_hd28"), None)
    torch.save({**saved, "args": argparse.Namespace(lr=1.0, nested={"a": [1]})}, "grn.pth")
    assert convert("grn.pth", "official", "native", "run", "--layout", "v1", "--model", "bit_hd28.yaml") == 0
    assert same(load_weights("run"), state_of("bit_hd28"))


def test_mixed_dtypes_are_kept_unless_one_is_asked_for(convert):
    state = {name: tensor.bfloat16() if "mlp" in name else tensor for name, tensor in state_of("bit_hd28").items()}
    torch.save(state, "grn.pth")
    model = ("--layout", "v1", "--model", "bit_hd28.yaml")
    assert convert("grn.pth", "official", "hf", "hf", *model) == 0
    assert same(load_weights("hf"), state)
    assert convert("hf", "hf", "official", "bf16.pth", "--dtype", "bf16") == 0
    assert same(load_torch(Path("bf16.pth")), {name: tensor.bfloat16() for name, tensor in state.items()})


def test_views_and_transposed_tensors_are_read_right(convert):
    state = state_of("bit_hd28")
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])  # as a flattening optimizer leaves them
    parts = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts)}
    views["text_proj.weight"] = state["text_proj.weight"].t().contiguous().t()
    torch.save(views, "grn.pth")
    assert convert("grn.pth", "official", "native", "run", "--layout", "v1", "--model", "bit_hd28.yaml") == 0
    assert same(load_weights("run"), state)


@pytest.mark.parametrize("shard_bytes", [1, 100_000])
def test_shards_end_before_they_grow_too_large(convert, monkeypatch, shard_bytes):
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", shard_bytes)
    torch.save(state_of("bit_hd24"), "grn.pth")
    assert convert("grn.pth", "official", "hf", "hf", "--layout", "v1", "--model", "bit_hd24.yaml") == 0
    index = json.loads(Path("hf/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in state_of("bit_hd24").values())
    assert len(files) > 10 and files == {path.name for path in Path("hf").glob("*.safetensors")}
    for file in files:
        tensors = load_file(f"hf/{file}")
        assert len(tensors) == 1 or sum(t.numel() * 4 for t in tensors.values()) <= shard_bytes
    assert same(load_weights("hf"), state_of("bit_hd24"))
    assert "parameters" in Path("hf/README.md").read_text()


def test_released_file_names_tell_the_layout(convert):
    torch.save(state_of("bit_hd24"), "GRN_T2V_2B.pth")
    assert convert("GRN_T2V_2B.pth", "official", "native", "run", "--model", "bit_hd24.yaml") == 0
    assert load_model("run").config.layout == "v1"


def test_official_width_needs_no_model_file(convert):
    state = state_of("bit_hd28")
    state["word_embed.weight"] = torch.randn(56, 512)
    state["head.proj.weight"], state["head.proj.bias"] = torch.randn(512, 56), torch.randn(512)
    torch.save(state, "grn.pth")
    assert convert("grn.pth", "official", "native", "run", "--layout", "v1") == 0
    config = load_model("run").config
    assert (config.latent_channels, config.rounds, config.label_form) == (64, 4, "bit")


@pytest.mark.parametrize("more,message", [
    ((), "--layout v1"),
    (("--layout", "v1"), "--model FILE.yaml"),
    (("--layout", "v1", "--model", "other.yaml"), "--layout says v1"),
    (("--layout", "v1", "--model", "absent.yaml"), "cannot read"),
    (("--layout", "v1", "--model", "wrong.yaml"), "unknown key model.roundss"),
    (("--layout", "v1", "--model", "bit_hd24.yaml", "--tokenizer", "a"), "--text-encoder"),
    (("--layout", "v3",), "v3"),
])
def test_a_request_that_does_not_tell_enough_is_bad_usage(convert, capsys, more, message):
    torch.save(state_of("bit_hd24"), "grn.pth")
    Path("other.yaml").write_text("{layout: v2, latent_channels: 8, rounds: 4}")
    Path("wrong.yaml").write_text("{latent_channels: 8, rounds: 4, roundss: 4}")
    assert convert("grn.pth", "official", "native", "run", *more) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("run*"))


def test_the_form_must_be_the_one_named(convert, capsys):
    torch.save(state_of("bit_hd24"), "grn.pth")
    assert convert("grn.pth", "native", "hf", "hf") == 2
    assert "--from official" in capsys.readouterr().err


def test_a_checkpoint_says_its_layout_itself(convert, capsys):
    torch.save(state_of("bit_hd24"), "grn.pth")
    assert convert("grn.pth", "official", "native", "run", "--layout", "v1", "--model", "bit_hd24.yaml") == 0
    assert convert("run", "native", "hf", "hf", "--layout", "v2") == 2
    assert "layout is v1, not v2" in capsys.readouterr().err
    assert convert("run", "native", "hf", "hf", "--layout", "v1") == 0


def test_every_tensor_that_does_not_fit_is_named(convert, capsys):
    state = state_of("bit_hd28")
    del state["head.norm.weight"], state["block_chunks.1.module.0.attn.k_proj.weight"]
    state["extra.weight"] = torch.zeros(2)
    state["head.proj.bias"] = torch.zeros(3)
    state["text_proj.bias"] = torch.zeros(56, dtype=torch.int64)
    torch.save(state, "grn.pth")
    model = ("--layout", "v1", "--model", "bit_hd28.yaml")
    assert convert("grn.pth", "official", "native", "run", *model) == 1
    message = capsys.readouterr().err
    for part in ("missing head.norm.weight", "missing block_chunks.1.module.0.attn.k_proj.weight",
                 "unexpected extra.weight", "head.proj.bias is [3], not [64]", "text_proj.bias is torch.int64"):
        assert part in message
    assert not list(Path().glob("run*"))


def test_missing_tensors_may_be_allowed_and_are_named(convert, capsys):
    state = state_of("bit_hd28")
    del state["head.norm.weight"]
    torch.save(state, "grn.pth")
    model = ("--layout", "v1", "--model", "bit_hd28.yaml")
    assert convert("grn.pth", "official", "native", "run", "--allow-missing", *model) == 0
    assert "missing head.norm.weight" in capsys.readouterr().err.replace("\n", " ")
    assert same(load_weights("run"), state)


def test_what_is_there_is_never_overwritten(convert, capsys):
    torch.save(state_of("bit_hd28"), "grn.pth")
    model = ("--layout", "v1", "--model", "bit_hd28.yaml")
    Path("full").mkdir()
    Path("full/mine").write_text("x")
    for output in ("full", "grn.pth"):
        before = sorted(Path().rglob("*"))
        assert convert("grn.pth", "official", "native", output, *model) == 1
        assert "is not overwritten" in capsys.readouterr().err
        assert sorted(Path().rglob("*")) == before
    Path("empty").mkdir()
    assert convert("grn.pth", "official", "native", "empty", *model) == 0
    Path("empty2").mkdir()
    assert convert("grn.pth", "official", "official", "empty2", *model) == 0


def test_what_a_killed_conversion_to_the_same_output_left_is_removed(convert):
    torch.save(state_of("bit_hd28"), "grn.pth")
    ours, host = partial_name(Path("run")).name, re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    killed = ours.replace(f"-{os.getpid()}-", f"-{int(ended.stdout)}-")
    others = {"run.partial", killed.replace("run", "runs"), killed.replace(f".{host}-", ".elsewhere-"), ours}
    for name in {killed, *others}:
        Path(name).mkdir()
        Path(name, "begun").touch()
    assert convert("grn.pth", "official", "native", "run", "--layout", "v1", "--model", "bit_hd28.yaml") == 0
    assert {path.name for path in Path().glob("*.partial")} == others


def test_a_set_that_is_not_there_cannot_be_chosen(convert, capsys):
    torch.save(state_of("bit_hd28"), "grn.pth")
    for wish in ("ema", "both"):
        assert convert("grn.pth", "official", "native", "run", "--layout", "v1", "--weights", wish) == 1
        assert f"--weights {wish}" in capsys.readouterr().err


def test_a_chunked_checkpoint_is_put_together(convert):
    """A checkpoint that several ranks saved holds boxes of tensors."""
    from grn_scale.checkpoint.checkpoint import save_checkpoint
    from grn_scale.checkpoint.chunks import Chunk, whole

    state = state_of("bit_hd24")
    chunks = []
    for name, tensor in state.items():
        if tensor.ndim == 2:
            half = tensor.shape[0] // 3
            chunks += [Chunk(name, tuple(tensor.shape), (0, 0), tensor[:half]),
                       Chunk(name, tuple(tensor.shape), (half, 0), tensor[half:])]
        else:
            chunks.append(whole(name, tensor))
    config = to_dict(golden_config("bit_hd24", "v2"))
    save_checkpoint("run", 5, {"model": chunks, "optimizer": [whole("x", torch.zeros(2))]},
                    {"step": 5, "config": {"model": config}}, keep_last=1)
    assert convert("run", "native", "official", "grn.pth") == 0
    assert same(load_torch(Path("grn.pth")), state)

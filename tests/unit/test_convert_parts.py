"""Video tokenizers, umT5 encoders, class-to-image models and whole pipelines, in and out."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grn_scale.checkpoint import load_weights
from grn_scale.cli import main
from grn_scale.demo.text_encoder import train_pieces
from grn_scale.model import load_model
from grn_scale.tokenizer import load_tokenizer
from tests.unit.test_convert import load_torch, same, shifted, state_of
from tests.unit.test_model_golden import GOLDEN


def under(file: str, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(GOLDEN / file).items()
            if name.startswith(prefix)}


@pytest.fixture
def convert(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(source: str, form: str, target: str, output: str, *more: str) -> int:
        return main(["convert", "--input", source, "--from", form, "--to", target, "--output", output, *more])

    return call


def test_a_tokenizer_keeps_every_bit_and_decodes_the_reference(convert):
    state = under("hbq_tokenizer.safetensors", "state/")
    torch.save({"vae": shifted(state, 1.0), "ema": state, "epoch": 3, "args": argparse.Namespace(a=1)}, "tok.ckpt")
    assert convert("tok.ckpt", "official", "native", "tok.safetensors") == 0
    assert convert("tok.safetensors", "native", "hf", "vae") == 0
    assert convert("vae", "hf", "official", "back.ckpt") == 0
    assert convert("tok.ckpt", "official", "official", "raw.ckpt", "--weights", "raw") == 0
    assert convert("tok.ckpt", "official", "official", "both.ckpt", "--weights", "both") == 0
    assert same(load_file("tok.safetensors"), state) and same(load_torch(Path("back.ckpt"))["vae"], state)
    assert same(load_torch(Path("raw.ckpt"))["vae"], shifted(state, 1.0))
    assert same(load_torch(Path("both.ckpt"))["ema"], state)
    record = load_file(GOLDEN / "hbq_tokenizer.safetensors")
    case = next(name.split("/")[0] for name in record if name.endswith("/video"))
    one, other = load_tokenizer("tok.safetensors"), load_tokenizer("vae")
    assert one.fingerprint == other.fingerprint
    with torch.no_grad():
        torch.testing.assert_close(other.encode(record[f"{case}/video"]), record[f"{case}/latent"], atol=2e-4, rtol=0)


def test_a_flat_tokenizer_file_without_ema_is_read(convert):
    state = under("hbq_tokenizer.safetensors", "state/")
    torch.save(state, "flat.ckpt")
    torch.save({"vae": state}, "vae.ckpt")
    for name in ("flat", "vae"):
        assert convert(f"{name}.ckpt", "official", "native", f"{name}.safetensors") == 0
        assert same(load_file(f"{name}.safetensors"), state)


def test_a_tokenizer_that_lacks_a_tensor_is_refused(convert, capsys):
    state = under("hbq_tokenizer.safetensors", "state/")
    del state["decoder.head.2.bias"]
    torch.save({"vae": state}, "tok.ckpt")
    assert convert("tok.ckpt", "official", "native", "tok.safetensors") == 1
    assert "missing decoder.head.2.bias" in capsys.readouterr().err
    assert convert("tok.ckpt", "official", "native", "tok.safetensors", "--layout", "v1") == 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    from grn_scale.errors import UserError

    with pytest.raises(UserError, match="no safetensors weights"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_umt5_becomes_the_encoder_of_transformers_and_comes_back(convert, dtype):
    from transformers import UMT5EncoderModel

    state = {name: tensor.to(dtype) for name, tensor in under("umt5_tiny.safetensors", "state/").items()}
    torch.save(state, "umt5.pth")
    assert convert("umt5.pth", "official", "hf", "encoder") == 0
    assert convert("encoder", "hf", "official", "back.pth") == 0
    assert same(load_torch(Path("back.pth")), state)
    model, report = UMT5EncoderModel.from_pretrained("encoder", dtype="auto", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and model.dtype == dtype
    model.save_pretrained("again")  # as transformers itself writes it: one file, no index
    assert convert("again", "hf", "official", "again.pth") == 0
    assert same(load_torch(Path("again.pth")), state)
    if dtype == torch.float32:
        record = load_file(GOLDEN / "umt5_tiny.safetensors")
        for case in ("batch", "long"):
            mask = record[f"{case}/mask"]
            with torch.no_grad():
                hidden = model(input_ids=record[f"{case}/ids"], attention_mask=mask).last_hidden_state
            torch.testing.assert_close(hidden[mask.bool()], record[f"{case}/hidden"][mask.bool()], atol=1e-4, rtol=0)


def class_file() -> dict[str, dict[str, torch.Tensor]]:
    state = under("grn_c2i.safetensors", "GRN_bit/state/")
    return {"model": state, "model_ema1": shifted(state, 1.0), "model_ema2": shifted(state, 2.0)}


CLASS_MODEL = "{latent_channels: 4, rounds: 3, label_form: bit, in_context_start: 2}"


def test_class_to_image_files_keep_their_three_sets(convert):
    sets = class_file()
    torch.save({**sets, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}, "epoch": 599,
                "args": argparse.Namespace(model="GRN_bit_B")}, "class.pth")
    Path("m.yaml").write_text(CLASS_MODEL)
    assert convert("class.pth", "official", "native", "class", "--model", "m.yaml") == 0
    assert convert("class", "native", "official", "back.pth") == 0
    back = load_torch(Path("back.pth"))
    assert back.keys() == sets.keys() and all(same(back[name], sets[name]) for name in sets)
    assert convert("class", "native", "hf", "hf") == 0
    assert convert("hf", "hf", "official", "single.pth") == 0
    single = load_torch(Path("single.pth"))
    assert all(same(single[name], sets["model_ema1"]) for name in sets)
    assert Path("single.pth").stat().st_size < Path("back.pth").stat().st_size / 2
    assert convert("class.pth", "official", "native", "raw", "--model", "m.yaml", "--weights", "raw") == 0
    assert convert("raw", "native", "official", "raw.pth") == 0
    assert same(load_torch(Path("raw.pth"))["model_ema1"], sets["model"])


def test_a_converted_class_model_is_the_reference(convert):
    from grn_scale.class_to_image import load_model as load_class_model

    torch.save({"model": class_file()["model"]}, "class.pth")
    Path("m.yaml").write_text(CLASS_MODEL)
    assert convert("class.pth", "official", "native", "class", "--model", "m.yaml") == 0
    model = load_class_model("class")
    assert same({f"net.{name}": tensor for name, tensor in model.state_dict().items()}, class_file()["model"])


def test_a_misshapen_class_tensor_is_named(convert, capsys):
    sets = class_file()
    sets["model_ema2"]["net.blocks.1.norm1.weight"] = torch.zeros(5)
    torch.save(sets, "class.pth")
    Path("m.yaml").write_text(CLASS_MODEL)
    assert convert("class.pth", "official", "native", "class", "--model", "m.yaml") == 1
    assert "net.blocks.1.norm1.weight is [5], not [32]" in capsys.readouterr().err


@pytest.fixture
def parts(convert):
    """A text model, a tokenizer and an encoder that fit one another, with pieces beside the encoder."""
    torch.save(state_of("bit_hd24"), "grn.pth")
    Path("m.yaml").write_text("{latent_channels: 8, rounds: 4}")
    torch.save({"vae": under("hbq_tokenizer.safetensors", "state/")}, "tok.ckpt")
    Path("text").mkdir()
    torch.save(under("umt5_tiny.safetensors", "state/"), "text/umt5.pth")
    return ("--model", "m.yaml", "--layout", "v1", "--tokenizer", "tok.ckpt", "--text-encoder", "text/umt5.pth")


def test_a_pipeline_folder_holds_all_its_models(convert, parts, capsys):
    from transformers import UMT5EncoderModel

    assert convert("grn.pth", "official", "hf", "pipe", *parts) == 1
    assert "spiece.model" in capsys.readouterr().err and not Path("pipe.partial").exists()
    Path("text/umt5-xxl").mkdir()
    Path("text/umt5-xxl/spiece.model").write_bytes(train_pieces(["a"]))
    assert convert("grn.pth", "official", "hf", "pipe", *parts) == 0
    index = json.loads(Path("pipe/model_index.json").read_text())
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        assert part in index and Path("pipe", part).is_dir()
    assert same(load_weights("pipe"), state_of("bit_hd24")) and load_model("pipe").config.layout == "v1"
    assert load_tokenizer("pipe").latent_channels == 8
    UMT5EncoderModel.from_pretrained("pipe/text_encoder")
    assert Path("pipe/tokenizer/spiece.model").exists() and Path("pipe/text_encoder/spiece.model").exists()
    assert convert("pipe", "hf", "official", "back.pth") == 0
    assert same(load_torch(Path("back.pth")), state_of("bit_hd24"))


def test_parts_that_do_not_belong_together_are_refused(convert, parts, capsys):
    Path("text/spiece.model").write_bytes(train_pieces(["a"]))
    state = state_of("bit_hd24")
    state["text_proj.weight"] = torch.zeros(96, 16)
    torch.save(state, "other.pth")
    assert convert("other.pth", "official", "hf", "pipe", *parts) == 1
    assert "text states of width 16" in capsys.readouterr().err
    swapped = (*parts[:4], "--tokenizer", "text/umt5.pth", "--text-encoder", "tok.ckpt")
    assert convert("grn.pth", "official", "hf", "pipe", *swapped) == 2
    assert convert("tok.ckpt", "official", "hf", "pipe", *parts[4:]) == 2
    assert convert("grn.pth", "official", "native", "pipe", *parts) == 2
    assert not list(Path().glob("pipe*"))


def test_a_sampler_opens_a_converted_run(convert, parts):
    from grn_scale.sampling.source import open_source

    assert convert("grn.pth", "official", "native", "run", *parts[:4]) == 0
    trained = open_source("run").load(raw=False)
    assert trained.weights == "raw" and trained.model.config.end_fraction == 0.999


def test_unknown_tensors_are_not_converted(convert, capsys):
    save_file({"something": torch.zeros(2)}, "x.safetensors")
    assert convert("x.safetensors", "native", "hf", "hf") == 1
    assert "no known model" in capsys.readouterr().err

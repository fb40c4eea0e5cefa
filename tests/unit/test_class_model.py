"""The class-to-image model: recorded tensors of the reference, its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from grn_scale.checkpoint.checkpoint import save_checkpoint
from grn_scale.checkpoint.chunks import whole
from grn_scale.class_to_image import ClassGRN, ClassModelConfig, build_model, load_model, save_model
from grn_scale.class_to_image.load import OFFICIAL_PREFIX, from_official, infer_config, to_official, with_weights
from grn_scale.class_to_image.positions import rotary_tables
from grn_scale.config import load_config
from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.load import to_dict
from grn_scale.errors import ConfigError, UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "grn_class_cases.json").read_text())
SMALL = ClassModelConfig(hidden_size=24, num_layers=3, num_heads=2, bottleneck_size=8, in_context_length=2,
                         in_context_start=1, num_classes=5, grid=3, latent_channels=3, rounds=2)


def golden_config(name: str) -> ClassModelConfig:
    c = CASES["models"][name]
    return ClassModelConfig(
        hidden_size=c["hidden_size"], num_layers=c["depth"], num_heads=c["num_heads"], mlp_ratio=c["mlp_ratio"],
        bottleneck_size=c["bottleneck_dim"], in_context_length=c["in_context_len"],
        in_context_start=c["in_context_start"], num_classes=c["num_classes"], grid=c["grid"],
        latent_channels=c["latent_dim"], rounds=c["hbq_round"], label_form="bit" if name == "GRN_bit" else "index")


def golden_record(name: str) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / "grn_c2i.safetensors")
    return {key.removeprefix(name + "/"): value for key, value in values.items() if key.startswith(name + "/")}


def golden_weights(name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix("state/"): value for key, value in golden_record(name).items() if key.startswith("state/")}


def golden_model(name: str) -> ClassGRN:
    return with_weights(golden_config(name), from_official(golden_weights(name)), name)


def lively(config: ClassModelConfig, seed: int = 3) -> ClassGRN:
    """A model whose predictions depend on what it reads: at first its head and its blocks are zero."""
    model = build_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def batch(config: ClassModelConfig, images: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (images, config.label_channels, config.grid, config.grid)
    labels = torch.randint(0, config.classes, shape, generator=generator).to(torch.uint8)
    return labels, torch.rand(images, generator=generator), torch.arange(images)


# --- the reference

@pytest.mark.parametrize("name", CASES["models"])
def test_logits_loss_and_gradients_equal_the_reference(name):
    model, record = golden_model(name), golden_record(name)
    x = (record["input_labels"], record["t"], record["y"])
    torch.testing.assert_close(model.logits(*x), record["logits"], atol=1e-5, rtol=0)
    loss = model.loss(*x, record["target"])
    torch.testing.assert_close(loss[None], record["loss"], atol=1e-6, rtol=0)
    loss.backward()
    norms = {f"grad_norm/{OFFICIAL_PREFIX}{n}": p.grad.norm()[None] for n, p in model.named_parameters()}
    assert set(norms) == {key for key in record if key.startswith("grad_norm/")}
    for key, norm in norms.items():
        torch.testing.assert_close(norm, record[key], rtol=1e-4, atol=1e-9, msg=lambda m: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES["models"])
def test_fixed_tables_equal_the_reference(name):
    config, record = golden_config(name), golden_record(name)
    assert torch.equal(ClassGRN(config).pos_embed, record["state/net.pos_embed"])
    tables = rotary_tables(config.grid, config.head_size, config.in_context_length)
    for table, key in zip(tables, ("rope_cos", "rope_sin")):
        torch.testing.assert_close(table.repeat_interleave(2, dim=1), record[key], atol=1e-7, rtol=0)


@pytest.mark.parametrize("name,million", [("b", 130.9), ("l", 458.5), ("h", 952.1), ("g", 2006.6)])
def test_shipped_sizes_have_the_official_shapes(name, million):
    config = load_config(f"configs/class/grn_{name}.yaml", cls=ClassModelConfig)
    assert load_config(f"configs/class/grn_{name}_bit.yaml", cls=ClassModelConfig) == dataclasses.replace(
        config, label_form="bit")
    with torch.device("meta"):
        state = ClassGRN(config).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    assert count / 1e6 == pytest.approx(million, abs=0.1)
    assert infer_config(state) == config
    if name == "b":
        assert count == 130_861_056 and len(state) == 183 and config == ClassModelConfig()


def test_the_shipped_run_holds_the_references_settings():
    config = load_config("configs/runs/class_b.yaml", cls=ClassConfig)
    assert config.model == ClassModelConfig() and config.noise == ClassConfig().noise
    images = config.data.token_budget // (config.model.tokens + 2) * config.data.packs_per_step
    assert images == 1024 and config.optimizer.lr == pytest.approx(5e-5 * images / 256)


@pytest.mark.parametrize("override", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.recompute=full"])
def test_a_run_that_would_cut_the_model_is_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config("configs/runs/class_b.yaml", [override], cls=ClassConfig)


# --- the network

@pytest.mark.parametrize("form", ["bit", "index"])
def test_scores_are_the_logits_in_the_samplers_form(form):
    model = lively(dataclasses.replace(SMALL, label_form=form))
    x = batch(model.config)
    with torch.no_grad():
        logits, scores = model.logits(*x).flatten(3).permute(0, 3, 2, 1).flatten(0, 1), model(*x)
    expected = logits[..., 1] - logits[..., 0] if form == "bit" else logits
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["bit", "index"])
def test_the_embedding_is_the_one_of_a_one_hot(form):
    model = lively(dataclasses.replace(SMALL, label_form=form))
    labels = batch(model.config)[0]
    one_hot = F.one_hot(labels.long(), model.config.classes).permute(0, 4, 1, 2, 3).flatten(1, 2).float()
    expected = model.x_embedder.proj2(model.x_embedder.proj1(one_hot)).flatten(2).transpose(1, 2).flatten(0, 1)
    rows = labels.flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(model.x_embedder(rows), expected, atol=1e-5, rtol=0)


def test_images_do_not_see_each_other_and_class_and_level_matter():
    model = lively(SMALL)
    labels, signal, class_id = batch(SMALL, 3)
    with torch.no_grad():
        together = model.logits(labels, signal, class_id)
        for b in range(3):
            alone = model.logits(labels[b:b + 1], signal[b:b + 1], class_id[b:b + 1])
            torch.testing.assert_close(alone[0], together[b], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model.logits(labels, signal, class_id + 1), together, atol=1e-2)
        assert not torch.allclose(model.logits(labels, signal * 0, class_id), together, atol=1e-4)


def test_a_model_without_class_tokens_in_front_runs():
    config = dataclasses.replace(SMALL, in_context_length=0)
    model = lively(config)
    assert "in_context_posemb" not in model.state_dict()
    assert model.logits(*batch(config)).shape == (2, 4, 3, 3, 3)


def test_bf16_weights_give_nearly_the_same_logits_in_fp32():
    model = lively(SMALL)
    x = batch(SMALL)
    with torch.no_grad():
        exact, rounded = model.logits(*x), model.bfloat16().logits(*x)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_gradients_flow_after_a_call_in_inference_mode():
    model = lively(SMALL)
    with torch.inference_mode():
        model.logits(*batch(SMALL))
    model.loss(*batch(SMALL), batch(SMALL)[0]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_weights_follow_seed_and_name_and_predict_every_label_alike():
    model, again = build_model(SMALL, 1).state_dict(), build_model(SMALL, 1).state_dict()
    assert all(torch.equal(model[name], again[name]) for name in model)
    other = build_model(SMALL, 2).state_dict()
    assert not torch.equal(model["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(model["blocks.0.attn.qkv.weight"], model["blocks.1.attn.qkv.weight"])
    labels, signal, class_id = batch(SMALL)
    loss = build_model(SMALL, 1).loss(labels, signal, class_id, labels)
    assert loss.item() == pytest.approx(math.log(SMALL.classes))


@pytest.mark.parametrize("change", [
    {"label_form": "byte"}, {"hidden_size": 25}, {"num_heads": 5}, {"hidden_size": 12}, {"rounds": 9},
    {"in_context_start": 3}, {"in_context_length": -1}, {"num_classes": 0}, {"grid": 0}, {"mlp_ratio": 0.01}])
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ConfigError, match="model"):
        dataclasses.replace(SMALL, **change)


def test_labels_and_classes_that_do_not_fit_are_refused():
    model = build_model(SMALL)
    labels, signal, class_id = batch(SMALL)
    with pytest.raises(UserError, match="labels are"):
        model.logits(labels[:, :2], signal, class_id)
    with pytest.raises(UserError, match="class ids lie in"):
        model.logits(labels, signal, class_id + SMALL.null_class)


# --- files

def test_a_saved_model_comes_back_bit_for_bit(tmp_path):
    model = lively(SMALL)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == SMALL
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_newest_checkpoint_of_a_run_loads_with_its_configuration(tmp_path):
    model, average = lively(SMALL), lively(SMALL, seed=4)
    sections = {name: [whole(n, p.detach()) for n, p in m.named_parameters()]
                for name, m in (("model", model), ("ema", average))}
    save_checkpoint(tmp_path, 3, sections, {"config": {"model": to_dict(SMALL)}}, keep_last=1)
    for ema, expected in ((False, model), (True, average)):
        loaded = load_model(tmp_path, ema=ema)
        assert loaded.config == SMALL
        assert all(torch.equal(loaded.state_dict()[name], t) for name, t in expected.state_dict().items())
    save_checkpoint(tmp_path / "other", 1, sections, {"config": {"model": {"num_layers": 3}}}, keep_last=1)
    with pytest.raises(UserError, match="not of a class-to-image model"):
        load_model(tmp_path / "other")


@pytest.mark.parametrize("name", CASES["models"])
def test_an_official_file_loads_and_its_names_convert_back(tmp_path, name):
    weights, config = golden_weights(name), golden_config(name)
    save_file(weights, tmp_path / "official.safetensors")
    model = load_model(tmp_path / "official.safetensors", config)
    assert {key: tensor.shape for key, tensor in to_official(model.state_dict()).items()} == {
        key: tensor.shape for key, tensor in weights.items()}
    known = {"latent_channels": config.latent_channels, "rounds": config.rounds}
    assert infer_config(from_official(weights), in_context_start=2, **known) == config


def test_weights_that_do_not_fit_are_named_one_by_one(tmp_path):
    weights = dict(lively(SMALL).state_dict())
    del weights["blocks.0.norm1.weight"]
    weights |= {"stranger": torch.zeros(1), "final_layer.linear.bias": torch.zeros(2),
                "blocks.1.norm1.weight": torch.ones(24, dtype=torch.int64)}
    save_file(weights, tmp_path / "weights.safetensors")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "weights.safetensors", SMALL)
    for part in ("missing blocks.0.norm1.weight", "unexpected stranger", "final_layer.linear.bias is [2], not [12]",
                 "blocks.1.norm1.weight is torch.int64"):
        assert part in str(caught.value)


def test_what_the_tensors_do_not_tell_has_to_be_given():
    weights = build_model(SMALL).state_dict()
    with pytest.raises(ConfigError, match="in_context_start"):
        infer_config(weights)
    with pytest.raises(ConfigError, match="latent_channels"):
        infer_config(weights, in_context_start=1)
    assert infer_config(weights, in_context_start=1, latent_channels=3, rounds=2) == SMALL
    with pytest.raises(ConfigError, match="there is no x_embedder"):
        infer_config({})


@pytest.mark.parametrize("hidden,ratio", [(24, 4.0), (24, 3.55), (40, 2.7), (64, 3.0), (96, 8 / 3)])
def test_any_inner_width_has_a_ratio(hidden, ratio):
    config = dataclasses.replace(SMALL, hidden_size=hidden, mlp_ratio=ratio)
    with torch.device("meta"):
        weights = ClassGRN(config).state_dict()
    inferred = infer_config(weights, in_context_start=1, latent_channels=3, rounds=2)
    assert inferred.ffn_hidden_size == config.ffn_hidden_size


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="no weights at"):
        load_model(tmp_path)
    save_model(build_model(SMALL), tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"kind": "other"}')
    with pytest.raises(UserError, match="does not describe a class-to-image model"):
        load_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(tmp_path / "model", SMALL)


@pytest.mark.parametrize(("name", "shape"), [
    ("pos_embed", (4, 4)), ("x_embedder.proj1.weight", (8,)), ("blocks.0.attn.q_norm.weight", (0,)),
    ("blocks.0.mlp.w3.weight", (8,)), ("y_embedder.embedding_table.weight", (3,)), ("in_context_posemb", (2,))])
def test_a_file_with_a_misshapen_tensor_is_refused_by_name(tmp_path, name, shape):
    from safetensors.torch import save_file

    weights = {key: value.contiguous() for key, value in build_model(SMALL).state_dict().items()}
    save_file(weights | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_model(tmp_path / "model.safetensors")

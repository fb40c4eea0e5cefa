"""The text encoder in training, as far as one process shows it; tests/distributed has the rest."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from grn_scale.config.class_schema import ClassConfig
from grn_scale.config.load import apply_overrides, build
from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.text_precision import int8_text_states
from grn_scale.model import build_model
from grn_scale.pretrain.train import check_text_encoder, encodes_texts
from grn_scale.tokenizer.sharded_text import ShardedTextEncoder
from grn_scale.tokenizer.text import (
    equal_length_batches,
    load_text_encoder,
    load_text_tokenizer,
    texts_of,
    with_text_states,
)
from tests.helpers.clips import caption, write_text_encoder
from tests.helpers.parity import batches_of_step, parity_config
from tests.helpers.text_ranks import samples_of

CAPTIONS = [caption(n) for n in range(6)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_encoder(tmp_path_factory.mktemp("encoder") / "text", len(CAPTIONS))


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder, 64)


@pytest.fixture
def alone():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_tokenizer_alone_knows_what_the_encoder_knows(folder, encoder):
    tokenizer = load_text_tokenizer(folder, 64)
    assert tokenizer.fingerprint == encoder.fingerprint and tokenizer.hidden_size == encoder.hidden_size
    assert [tokenizer.token_ids(text) for text in CAPTIONS] == [encoder.token_ids(text) for text in CAPTIONS]


def test_the_texts_of_a_clip_have_an_entry_for_each_task_it_can_be_trained_as():
    captions = ["a cat", "", "a cat", "a dog"]
    assert texts_of(captions, 1, True) == ["<T2I>a cat", "", "<T2I>a dog"]
    assert texts_of(captions, 3, True) == ["<T2V>a cat", "<I2V>a cat", "", "<T2V>a dog", "<I2V>a dog"]
    assert texts_of(captions, 3, False) == ["a cat", "", "a dog"]
    assert texts_of([], 3, True) == []


def test_texts_of_one_length_run_together_and_equal_ones_once():
    texts = [[1], [5, 1], [3, 1], [1], [4, 1], [9, 9, 1]]
    assert equal_length_batches(texts, 2) == [[(1,)], [(3, 1), (4, 1)], [(5, 1)], [(9, 9, 1)]]
    assert equal_length_batches(texts[::-1], 2) == equal_length_batches(texts, 2)
    assert equal_length_batches([], 2) == []


def test_samples_get_the_states_of_their_ids_and_bad_ones_zeros(encoder):
    ids = [tuple(encoder.token_ids(text)) for text in (*CAPTIONS[:2], CAPTIONS[0])]
    samples = samples_of(ids)
    samples[1] = replace(samples[1], valid=False)
    states = [sample.text_states for sample in with_text_states(samples, encoder)]
    first = encoder.encode(CAPTIONS[:1])[0]
    assert torch.equal(states[0], first) and states[2] is states[0]
    assert states[1].shape == (len(ids[1]), encoder.hidden_size) and not states[1].any()
    kept = replace(samples[0], text_ids=None, text_states=first + 1)
    assert torch.equal(with_text_states([kept], encoder)[0].text_states, first + 1)


def test_one_process_alone_encodes_what_the_whole_encoder_does(folder, encoder, alone):
    shared = ShardedTextEncoder(folder, alone, CPU)
    ids = [encoder.token_ids(text) for text in ("", *CAPTIONS, CAPTIONS[0], "dog")]
    found, expected = shared.encode_ids(ids, batch=2), encoder.encode_ids(ids, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found[0].zero_()
    assert torch.equal(shared.encode_ids(ids[:1])[0], expected[0]) and shared.encode_ids([]) == []


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize("damage, message", [
    (lambda t: without(t, "shared.weight"), "lacks weights of a UMT5 encoder: shared.weight"),
    (lambda t: without(t, "encoder.final_layer_norm.weight"), "lacks .*final_layer_norm"),
    (lambda t: without(t, "encoder.block.1.layer.0.SelfAttention.q.weight"), "lacks .*block.1.layer.0"),
    (lambda t: {**t, "encoder.final_layer_norm.weight": torch.ones(3)}, r"has shape \[3\], but config.json says"),
])
def test_weights_that_are_no_encoder_are_named(folder, tmp_path, alone, damage, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    save_file(damage(load_file(folder / "model.safetensors")), copy / "model.safetensors")
    with pytest.raises(UserError, match=message):
        ShardedTextEncoder(copy, alone, CPU)


def test_a_damaged_file_or_configuration_is_named(folder, tmp_path, alone):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="model.safetensors cannot be loaded"):
        ShardedTextEncoder(copy, alone, CPU)
    (copy / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="config.json"):
        ShardedTextEncoder(copy, alone, CPU)


def info(states, fingerprint=""):
    return SimpleNamespace(text_states=states, text_fingerprint=fingerprint)


def test_the_encoder_runs_in_training_where_a_dataset_holds_ids_only():
    assert not encodes_texts(Config(), [info("bf16"), info("int8")])
    assert encodes_texts(Config(), [info("bf16"), info("none")])
    assert not encodes_texts(ClassConfig(), [info("none")]), "a class-to-image model reads no text"


def test_training_on_ids_is_refused_without_the_encoder_they_are_for(folder, encoder, tmp_path):
    def config(*overrides):
        return build(Config, apply_overrides({}, overrides, Config, tmp_path))

    datasets = [info("none", encoder.fingerprint), info("none", encoder.fingerprint)]
    check_text_encoder(config(f"text.encoder={folder}", "text.max_tokens=64"), datasets)
    with pytest.raises(ConfigError, match="text.encoder is not set"):
        check_text_encoder(config(), datasets)
    with pytest.raises(ConfigError, match="text.max_tokens=63 give"):
        check_text_encoder(config(f"text.encoder={folder}", "text.max_tokens=63"), datasets)
    with pytest.raises(ConfigError, match="made with the text encoder 0000"):
        check_text_encoder(config(f"text.encoder={folder}", "text.max_tokens=64"), [*datasets, info("none", "0" * 64)])


def test_the_change_of_scores_by_int8_is_small_and_measured():
    config = parity_config()
    model = build_model(config.model, config.seed)
    batches = batches_of_step(0, config)
    found = int8_text_states(model, batches)
    assert 0 < found["relative_l2"] < 0.02 and 0 < found["largest_score_difference"]
    silent = [replace(batch, input=replace(batch.input, text_TC=torch.zeros_like(batch.input.text_TC)))
              for batch in batches]
    assert int8_text_states(model, silent) == {"relative_l2": 0.0, "largest_score_difference": 0.0}

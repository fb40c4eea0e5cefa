"""The text encoder in training: shared among ranks it gives the states of the whole one, and none holds it all."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from grn_scale.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TextConfig, TrainConfig
from grn_scale.demo.text_encoder import HIDDEN_SIZE
from grn_scale.train.metrics import read_metrics
from tests.helpers.clips import caption, write_text_encoder
from tests.helpers.rank_pool import free_port
from tests.helpers.text_ranks import key_of, write_dataset_of_texts

CAPTIONS = ["", *(caption(n) for n in range(12)), "a dog", "<T2V>red square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_text_encoder(tmp_path_factory.mktemp("encoder") / "text", 12)


@pytest.fixture(scope="module")
def bf16_folder(folder, tmp_path_factory) -> Path:
    """The same in bf16, with its weights in several files."""
    import shutil

    import torch
    from transformers import UMT5EncoderModel

    copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("encoder") / "bf16"))
    (copy / "model.safetensors").unlink()
    UMT5EncoderModel.from_pretrained(folder, local_files_only=True).to(torch.bfloat16).save_pretrained(
        copy, max_shard_size="50KB")
    assert (copy / "model.safetensors.index.json").is_file()
    return copy


@pytest.mark.parametrize("texts", [[CAPTIONS, CAPTIONS[3:]], [[], CAPTIONS[:1]], [[], []]],
                         ids=["both", "second", "none"])
def test_states_are_those_of_the_whole_encoder_whoever_has_texts(pools, folder, texts) -> None:
    results = pools.run(2, "tests.helpers.text_ranks:encode_own", folder=folder, texts=texts)
    for result, own in zip(results, texts):
        assert result["equal"] and result["texts"] == len(own)
        assert result["hidden_size"] == HIDDEN_SIZE and result["device"] == "cpu"
        # Half of the layers, and one norm: the embedding table is in no process.
        assert result["shared_bytes"] == pytest.approx(result["whole_bytes"] / 2, rel=0.01)


def test_weights_in_bf16_and_in_several_files_are_read_as_they_are(pools, bf16_folder) -> None:
    results = pools.run(2, "tests.helpers.text_ranks:encode_own", folder=bf16_folder, texts=[CAPTIONS, CAPTIONS[3:]])
    assert all(result["equal"] for result in results)


@pytest.mark.parametrize("parallel", [ParallelConfig(tensor=2), ParallelConfig(pipeline=2), ParallelConfig()],
                         ids=["TP2", "PP2", "DP2"])
def test_the_ranks_of_one_copy_of_the_model_divide_its_texts(pools, folder, parallel) -> None:
    texts = [*CAPTIONS, CAPTIONS[2]]
    results = pools.run(2, "tests.helpers.text_ranks:encode_divided", folder=folder, texts=texts, parallel=parallel)
    assert all(result["equal"] and result["nothing"] == [] for result in results)
    encoded = [result["encoded"] for result in results]
    # All but the sample that is not valid, and the repeated one once.
    assert encoded == [7, 7] if parallel != ParallelConfig() else sum(encoded) >= 2 * 14


def training(folder: Path, dataset: Path, output: Path, **parallel: int) -> Config:
    """Five steps of four packs with dropped captions, both tasks, validation, and samples that are damaged."""
    return Config(
        seed=3, output=str(output), text=TextConfig(encoder=str(folder), max_tokens=64),
        model=ModelConfig(hidden_size=32, num_layers=2, num_heads=2, ffn_hidden_size=64, text_hidden_size=HIDDEN_SIZE,
                          num_chunks=1, latent_channels=4, rounds=4),
        data=DataConfig(dataset=str(dataset), token_budget=128, packs_per_step=4, validation_fraction=0.2,
                        validation_packs=2, caption_drop=0.2, i2v_share=0.4),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(steps=5, validate_every=5, checkpoint_every=5, threads=1, precision="fp32"))


@pytest.mark.parametrize("parallel", [{"tensor": 2}, pytest.param({}, marks=pytest.mark.slow)], ids=["TP2", "DP2"])
def test_training_on_ids_equals_training_on_bf16_states(pools, folder, tmp_path, parallel) -> None:
    captions = [caption(n) for n in range(12)] * 4
    losses = {}
    for states in ("bf16", "none"):
        dataset = write_dataset_of_texts(tmp_path / states, folder, captions, states)
        damage(dataset / "video-000000.tar")
        output = tmp_path / f"run-{states}"
        pools.run(2, "tests.helpers.text_ranks:train", ports=(free_port(), free_port()),
                  config=training(folder, dataset, output, **parallel))
        rows = read_metrics(output / "metrics.jsonl")
        losses[states] = [(row.get("loss"), row.get("gradient_norm"), row.get("validation_loss")) for row in rows]
        assert any(row.get("bad_samples") for row in rows), "no step met a damaged sample"
    assert losses["none"] == losses["bf16"] and len(losses["none"]) == 6


def damage(tar: Path) -> None:
    """Change a byte of every fourth clip's bits."""
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as members:
        for number in range(0, 48, 4):
            data[members.getmember(f"{key_of(number)}.bits").offset_data] ^= 1
    tar.write_bytes(data)

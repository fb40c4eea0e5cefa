"""Rules between sections: what fits starts, what does not is refused with the nearest value that would."""

import os
import random
import re

import pytest

from grn_scale.config import load_config
from grn_scale.config.check import check_layout, check_output, check_set, check_training
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.data.schema import DatasetInfo, TextRef
from grn_scale.errors import ConfigError, UserError

DATASET = DatasetInfo(
    format_version=2, tokenizer_fingerprint="t", latent_channels=16, rounds=4, text_fingerprint="e",
    text_hidden_size=64, text_states="bf16", task_tags=True, empty_text=TextRef("k", 2, "text-000000.tar"), fps=8.0,
    samples=10, tokens=100, video_shards=(), text_shards=(), snapshot="s")


def tiny(*overrides):
    return load_config(None, ["model=model/grn_tiny.yaml", *overrides])


def refusal(config, world):
    with pytest.raises(ConfigError) as caught:
        check_layout(config, world)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("overrides", "world"), [
    ((), 1),
    (("data.packs_per_step=6",), 3),
    (("parallel.tensor=2",), 2),
    (("parallel.tensor=4", "parallel.sequence=false", "data.packs_per_step=2"), 8),
    (("parallel.pipeline=3", "parallel.virtual_pipeline=2", "data.packs_per_step=6"), 6),
    (("parallel.pipeline=2", "parallel.tensor=2", "data.packs_per_step=1"), 4),
    (("zero.stage=0", "train.precision=fp32"), 1),
    (("parallel.context=4", "data.packs_per_step=2"), 8),
    (("parallel.context=2", "parallel.tensor=2", "parallel.pipeline=2", "data.packs_per_step=1"), 8),
    (("zero.stage=3", "parallel.tensor=2", "parallel.recompute=full"), 2),
])
def test_layout_that_fits_is_accepted(overrides, world):
    check_layout(tiny(*overrides), world)


@pytest.mark.parametrize(("overrides", "world", "words"), [
    (("parallel.tensor=3",), 3, ("must divide model.num_heads (4)", "parallel.tensor=2 is the nearest")),
    (("parallel.tensor=8",), 8, ("must divide model.num_heads (4)", "parallel.tensor=4 is the nearest")),
    (("parallel.tensor=4", "model.ffn_hidden_size=770"), 4, ("model.ffn_hidden_size (770)", "parallel.tensor=2")),
    (("parallel.tensor=4", "model.latent_channels=10", "model.rounds=1"), 4,
     ("the labels of a token (model.latent_channels x rounds) (10)", "parallel.tensor=2")),
    (("model.ffn_hidden_size=768", "model.latent_channels=3", "model.hidden_size=192", "model.num_heads=6",
      "parallel.tensor=3", "data.token_budget=1024"), 3, ("data.token_budget=1152 is the nearest",)),
    (("parallel.pipeline=4", "data.packs_per_step=4"), 4, ("4 x 1", "model.num_layers (6)", "parallel.pipeline=3")),
    (("parallel.pipeline=2", "parallel.virtual_pipeline=2", "data.packs_per_step=2"), 2,
     ("2 x 2", "parallel.virtual_pipeline=1 is the nearest")),
    (("parallel.virtual_pipeline=2",), 1, ("nothing to interleave",)),
    (("parallel.tensor=2",), 3, ("the job has 3 processes", "start 2 processes")),
    (("parallel.tensor=2", "parallel.pipeline=2"), 2, ("start 4 processes",)),
    (("data.packs_per_step=6",), 4, ("a multiple of the 4 data-parallel ranks", "data.packs_per_step=4 is the")),
    (("data.packs_per_step=1",), 2, ("data.packs_per_step=2 is the nearest",)),
    (("parallel.pipeline=2", "parallel.virtual_pipeline=3", "data.packs_per_step=6"), 4,
     ("3 for each of 2 data-parallel ranks", "data.packs_per_step=4 is the nearest")),
    (("zero.stage=0",), 1, ("zero.stage=1, or train.precision=fp32",)),
    (("zero.stage=2", "parallel.pipeline=2", "data.packs_per_step=2"), 2, ("zero.stage=1, or parallel.pipeline=1",)),
    (("parallel.context=8",), 8, ("has 4 heads to share out", "parallel.context=4 is the nearest")),
    (("parallel.context=4", "parallel.tensor=2"), 8, ("has 2 heads", "parallel.context=2 is the nearest")),
    (("parallel.context=3",), 3, ("into 3 equal parts", "data.token_budget=")),
    (("parallel.context=2",), 3, ("start 2 processes",)),
])
def test_layout_that_does_not_fit_names_rule_and_nearest_value(overrides, world, words):
    message = refusal(tiny(*overrides), world)
    for word in words:
        assert word in message


def test_all_broken_rules_are_told_at_once():
    message = refusal(tiny("parallel.tensor=3", "parallel.pipeline=4", "zero.stage=0"), 12)
    assert all(word in message for word in ("model.num_heads", "model.num_layers", "zero.stage"))


def test_a_layout_is_legal_once_every_remedy_of_its_refusal_is_followed():
    choose, refused = random.Random(3), 0
    for _ in range(500):
        heads, world = choose.choice([3, 4, 5, 6, 18, 32]), choose.choice([1, 2, 3, 4, 6, 8, 12, 16, 24])
        stage = choose.choice([0, 1, 2, 3])
        settings = {
            "model.num_heads": heads, "model.hidden_size": 8 * heads, "model.num_chunks": 1,
            "model.num_layers": choose.choice([2, 3, 4, 6, 28]), "model.ffn_hidden_size": choose.choice([96, 100, 256]),
            "model.latent_channels": choose.choice([3, 4, 16]), "parallel.tensor": choose.choice([1, 1, 2, 3, 4, 8]),
            "parallel.pipeline": choose.choice([1, 1, 2, 3, 4]), "parallel.context": choose.choice([1, 1, 2, 3, 8]),
            "parallel.virtual_pipeline": choose.choice([1, 1, 2, 3]), "zero.stage": stage,
            "zero.offload_optimizer": "true" if stage >= 2 and choose.random() < 0.5 else "false",
            "train.precision": choose.choice(["bf16", "fp32"]), "data.token_budget": choose.choice([384, 1024, 16384]),
            "data.packs_per_step": choose.choice([1, 4, 6, 16]),
            "kernels.cross_entropy": choose.choice(["torch", "apex"])}
        try:
            check_layout(load_config(None, [f"{key}={value}" for key, value in settings.items()]), world)
        except ConfigError as error:
            refused += 1
            for line in str(error).splitlines():
                first = re.split(r", or ", line.rsplit(": ", 1)[1])[0]
                settings |= dict(re.findall(r"((?:parallel|data|zero|kernels)\.\w+)=(\w+)", first))
                if processes := re.search(r"start (\d+) processes", first):
                    world = int(processes[1])
            check_layout(load_config(None, [f"{key}={value}" for key, value in settings.items()]), world)
    assert refused > 400


def test_class_models_refuse_what_does_nothing_for_them():
    for setting in ("parallel.context=2", "parallel.tensor=2", "kernels.norm=apex", "kernels.compile=always"):
        with pytest.raises(ConfigError, match=f"{setting.split('=')[0]} is .* class-to-image"):
            load_config("configs/runs/class_b.yaml", [setting], SCHEMAS)


@pytest.mark.parametrize(("override", "words"), [
    ("model.rounds=3", "set model.rounds=4"), ("model.latent_channels=64", "set model.latent_channels=16"),
    ("model.text_hidden_size=4096", "set model.text_hidden_size=64"),
    ("model.task_tags=false", "set model.task_tags=true"),
])
def test_model_of_another_dataset_is_refused(override, words):
    check_training(tiny(), DATASET)
    with pytest.raises(ConfigError, match=words):
        check_training(tiny(override, "data.dataset=tokens"), DATASET)


def test_field_left_empty_is_named():
    config = tiny("output=runs/a")
    check_set(config, "output")
    with pytest.raises(ConfigError, match="data.dataset is not set: give data.dataset=VALUE"):
        check_set(config, "output", "data.dataset")


def test_an_output_that_cannot_be_a_folder_is_refused_and_nothing_is_made(tmp_path):
    check_output(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    for place in ("file", "file/run"):
        with pytest.raises(UserError, match="output: .*file is a file; give a folder"):
            check_output(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_on_a_read_only_file_system_is_refused():
    if os.access("/proc/sys", os.W_OK) or not os.access("/proc/sys", os.F_OK):
        pytest.skip("/proc/sys can be written to here, or is not there")
    with pytest.raises(UserError, match="output: /proc/sys cannot be written to"):
        check_output("/proc/sys/run")

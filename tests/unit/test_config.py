"""Configuration files and overrides: what is read, and what is refused with which words."""

import pytest

from grn_scale.config import Config, load_config, to_dict
from grn_scale.config.load import build
from grn_scale.errors import ConfigError


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*arguments):
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return str(caught.value)


def test_no_file_and_no_override_gives_the_defaults():
    assert load_config(None) == Config()


def test_later_override_wins_over_earlier_and_over_the_file(tmp_path):
    path = write(tmp_path, "model:\n  num_layers: 4\n")
    config = load_config(path, ["model.num_layers=6", "model.num_layers=8"])
    assert config.model.num_layers == 8


def test_resolved_values_build_an_equal_configuration():
    config = load_config(None, ["optimizer.betas=[0.8, 0.9]", "seed=3", "text.encoder=some/folder"])
    assert build(Config, to_dict(config)) == config


def test_init_from_is_written_as_it_is_read(tmp_path):
    config = load_config(write(tmp_path, "init:\n  from: runs/a\n  weights: raw\n"), ["init.weights=ema"])
    assert (config.init.from_, config.init.weights) == ("runs/a", "ema")
    assert to_dict(config)["init"] == {"from": "runs/a", "weights": "ema", "partial": False}
    assert build(Config, to_dict(config)) == config
    assert "did you mean init.from?" in refusal(None, ["init.from_=runs/a"])
    assert "init.from names nothing" in refusal(None, ["init.partial=true"])


def test_section_may_name_a_file_beside_the_run_file_or_one_that_ships(tmp_path):
    write(tmp_path, "num_layers: 10\n", "mine.yaml")
    path = write(tmp_path, "model: mine.yaml\n")
    assert load_config(path).model.num_layers == 10
    assert load_config(path, ["model=model/grn_8b.yaml", "model.num_layers=72"]).model.num_layers == 72
    assert load_config(path, ["model=model/grn_8b.yaml"]).model.hidden_size == 4096


def test_section_file_that_does_not_exist_names_every_place_looked_at(tmp_path):
    message = refusal(write(tmp_path, "model: absent.yaml\n"))
    assert "model: no file 'absent.yaml'" in message and str(tmp_path) in message


@pytest.mark.parametrize(("override", "near"), [
    ("model.num_layer=4", "model.num_layers"), ("optimiser.lr=1", "optimizer"),
    ("optimizer.bettas=[1, 1]", "optimizer.betas"),
])
def test_unknown_key_names_the_nearest(override, near):
    assert f"did you mean {near}?" in refusal(None, [override])


def test_key_near_to_nothing_lists_what_is_valid():
    assert "valid keys: loss.gamma" in refusal(None, ["loss.qqq=1"])


def test_bad_yaml_names_file_and_line(tmp_path):
    path = write(tmp_path, "seed: 1\nmodel:\n  num_layers: [4\n")
    message = refusal(path)
    assert f"{path}:" in message and "not valid YAML" in message


def test_duplicate_key_names_its_line(tmp_path):
    path = write(tmp_path, "train:\n  steps: 1\n  log_every: 1\n  steps: 2\n")
    assert f"{path}:4: key 'steps' stands here a second time" in refusal(path)


@pytest.mark.parametrize(("override", "words"), [
    ("model.num_layers=4.0", "model.num_layers is 4.0, but must be a whole number"),
    ("model.num_layers=true", "must be a whole number"),
    ("model.task_tags=1", "model.task_tags is 1, but must be true or false"),
    ("optimizer.lr=fast", "optimizer.lr is 'fast', but must be a number"),
    ("optimizer.betas=[0.9]", "must be a list of 2 values"),
    ("data.dataset=7", "data.dataset is 7, but must be text"),
    ("model=3", "model is 3, but must be a section"),
    ("seed", "must have the form key.sub=value"),
    ("seed.sub=1", "seed"),
])
def test_value_of_another_type_is_refused_with_key_and_value(override, words):
    assert words in refusal(None, [override])


def test_numbers_may_be_written_as_yaml_1_2_has_them():
    config = load_config(None, ["optimizer.lr=1e-3", "schedule.end_factor=1", "tokenize.fps=.5"])
    assert (config.optimizer.lr, config.schedule.end_factor, config.tokenize.fps) == (1e-3, 1.0, 0.5)


@pytest.mark.parametrize(("override", "words"), [
    ("data.token_budget=1000", "1024 is the nearest"),
    ("tokenize.max_frames=12", "9 would do"),
    ("model.num_heads=5", "must be a multiple of model.num_heads (5)"),
    ("parallel.recompute=some", "must be one of none, selective, full"),
    ("zero.stage=5", "zero.stage is 5"),
    ("train.steps=0", "train.steps is 0, but must be greater than 0"),
    ("train.keep_every=300", "multiple of train.checkpoint_every (200)"),
    ("text.max_tokens=513", "positions for at most 512"),
])
def test_rules_of_a_section_give_value_rule_and_remedy(override, words):
    assert words in refusal(None, [override])


def test_file_that_cannot_be_read_is_named(tmp_path):
    assert str(tmp_path / "absent.yaml") in refusal(tmp_path / "absent.yaml")
    assert "must hold keys and values" in refusal(write(tmp_path, "- 1\n"))


@pytest.mark.parametrize("name", ["grn_tiny", "grn_0b", "grn_2b", "grn_8b"])
def test_every_model_that_ships_loads(name):
    assert load_config(None, [f"model=model/{name}.yaml"]).model.num_layers > 0

"""Datasets read together: how often each sample is visited, and the proof of it from a ledger."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from grn_scale.command_line import config_yaml
from grn_scale.config.data_schema import DataConfig, MixturePart
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.data.ledger import record_step
from grn_scale.data.loader import PackLoader
from grn_scale.data.mixture import Mixture, Visits, dataset_visits, scale_images
from grn_scale.data.packing import Cost
from grn_scale.data.plan import Plan
from grn_scale.data.split import held_out
from grn_scale.data.state import DataState
from grn_scale.data_pipeline import index as index_command
from grn_scale.data_pipeline.verify_ledger import check_ledger, ledger_lines, show_ledger
from grn_scale.errors import ConfigError, UserError
from tests.helpers.memory_index import make_index
from tests.helpers.token_dataset import write_tokens

PARTS = ("a", "b", "c")


def memory_mixture(*repeats: float, **settings) -> Mixture:
    datasets = tuple(make_index(shards=4 * (i + 1), name=f"clip-{name}-", **settings)
                     for i, name in zip(range(len(repeats)), PARTS))
    return Mixture(datasets, tuple(Visits(r, r) for r in repeats))


def plan_of(mixture, **changes) -> Plan:
    return Plan(mixture, **{**dict(seed=5, token_budget=1024, caption_drop=0.1, i2v_share=0.3, window_shards=4,
                                   validation_fraction=0.1), **changes})


def epoch_draws(plan: Plan, epoch: int = 0):
    state = replace(plan.start(), epoch=epoch)
    draws = []
    while state.epoch == epoch:
        packs, state = plan.next_step(state, 7)
        assert all(p.tokens <= plan.token_budget for p in packs)
        draws += [draw for p in packs for draw in p.draws]
    return draws


def test_repeats_visit_each_sample_so_often_and_fractions_choose_anew_for_every_epoch():
    mixture = memory_mixture(1, 2.25, 0.5)
    plan, extra = plan_of(mixture), []
    for epoch in (0, 1):
        draws = epoch_draws(plan, epoch)
        seen = Counter((draw.dataset, draw.key) for draw in draws)
        assert len({draw.index for draw in draws}) == len(draws) == plan.visits_in_epoch(epoch)
        for dataset, (index, repeats) in enumerate(zip(mixture.datasets, (1, 2.25, 0.5))):
            counts = [seen[dataset, key] for key in index.keys if not held_out(key, 0.1)]
            assert set(counts) <= {int(np.floor(repeats)), int(np.ceil(repeats))}
            assert np.mean(counts) == pytest.approx(repeats, abs=0.1 * (repeats % 1 > 0))
        assert not any(held_out(key, 0.1) for _, key in seen)
        extra.append({sample for sample, count in seen.items() if sample[0] == 1 and count == 3})
    assert extra[0] != extra[1]


def test_every_window_has_its_share_of_every_dataset():
    plan = plan_of(memory_mixture(1, 1, 1), window_shards=6)
    shares = [np.bincount(plan._window(0, window).dataset, minlength=3) for window in range(plan.windows)]
    # 4, 8 and 12 shards in windows of 6: 1, 2 and 3 of them, one more or less where a shard falls on a border.
    assert all(min(share) > 0 for share in shares)
    assert np.ptp([share[2] / share.sum() for share in shares]) < 0.4


def test_weights_and_temperature_set_the_shares_of_as_many_visits_as_there_are_samples():
    weighed = dataset_visits([MixturePart("a", weight=3), MixturePart("b", weight=1)], [100, 300], 1)
    assert [v.images * n for v, n in zip(weighed, (100, 300))] == pytest.approx([300, 100])
    plain = [MixturePart("a"), MixturePart("b")]
    assert dataset_visits(plain, [100, 900], 1) == [Visits(1, 1), Visits(1, 1)]
    hot = dataset_visits(plain, [100, 900], 2)
    assert [v.images * n for v, n in zip(hot, (100, 900))] == pytest.approx([250, 750])
    with pytest.raises(ConfigError, match="b has no samples"):
        dataset_visits([MixturePart("a", weight=3), MixturePart("b", weight=1)], [100, 0], 1)


def test_the_image_share_is_reached_by_scaling_images_and_videos():
    mixture = Mixture.of(make_index(shards=20), image_share=0.7)
    assert mixture.expected_visits == pytest.approx(800)
    draws = epoch_draws(plan_of(mixture))
    assert np.mean([draw.task == "T2I" for draw in draws]) == pytest.approx(0.7, abs=0.05)
    for share, tasks in ((0.0, {"T2V", "I2V"}), (1.0, {"T2I"})):
        assert {draw.task for draw in epoch_draws(plan_of(make_index(), image_share=share))} == tasks
    with pytest.raises(ConfigError, match="image_share is 0.5, but there are no videos"):
        scale_images([Visits()], [(10, 0)], 0.5)


def test_shards_without_images_get_no_pass_for_the_visits_of_images():
    plan = plan_of(Mixture((make_index(shards=3, frames=(1,)), make_index(shards=5, frames=(3,), name="video-")),
                           (Visits(3, 1), Visits(3, 1))))
    assert len(plan._passes) == 3 * 3 + 5


def test_validation_takes_each_held_out_sample_once_whatever_the_repeats():
    mixture = memory_mixture(2.5, 0.25)
    draws = epoch_draws(plan_of(mixture, split="validation"))
    expected = sorted((d, key) for d, index in enumerate(mixture.datasets) for key in index.keys if held_out(key, 0.1))
    assert sorted((draw.dataset, draw.key) for draw in draws) == expected


def test_datasets_that_no_one_model_could_read_are_refused_with_both_names():
    other = replace(make_index(name="other"), settings={"rounds": 3})
    with pytest.raises(ConfigError, match="x and y do not go together: rounds is 2 in the one and 3 in the other"):
        Mixture((make_index(), other), (Visits(), Visits()), ("x", "y"))


def test_a_mixture_is_written_in_the_run_file_and_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text("data:\n  mixture:\n  - {dataset: a, repeats: 2}\n  - dataset: b\n")
    data = load_config(tmp_path / "run.yaml").data
    assert data.parts == (MixturePart("a", repeats=2.0), MixturePart("b"))
    data = load_config(None, ["data.mixture=[{dataset: a, weight: 1}]", "data.image_share=0.5"]).data
    assert data.parts == (MixturePart("a", weight=1.0),) and data.image_share == 0.5
    (tmp_path / "saved.yaml").write_text(config_yaml(Config(data=data)))
    assert load_config(tmp_path / "saved.yaml").data == data
    assert load_config(tmp_path / "saved.yaml", ["data.mixture=[]", "data.dataset=c", "data.image_share="]).data == (
        DataConfig(dataset="c"))


@pytest.mark.parametrize(("overrides", "message"), [
    (["data.mixture=[{dataset: a, repeat: 2}]"], r"unknown key data.mixture\[0\].repeat; did you mean"),
    (["data.mixture=[a]"], r"data.mixture\[0\] is 'a', but must be a section with the keys dataset, repeats, weight"),
    (["data.mixture=a"], "data.mixture is 'a', but must be a list$"),
    (["data.mixture=[{repeats: 2}]"], "names no dataset"),
    (["data.mixture=[{dataset: a, repeats: 0}]"], "repeats of a is 0.0, but must be greater than 0"),
    (["data.mixture=[{dataset: a, repeats: 1, weight: 1}]"], "takes one of them"),
    (["data.mixture=[{dataset: a, weight: 1}, {dataset: b}]"], "of 2 datasets a has a weight, but all must or none"),
    (["data.mixture=[{dataset: a}]", "data.dataset=b"], "both set"),
    (["data.mixture=[{dataset: a, repeats: 2}]", "data.temperature=2"], "leave repeats and weight out"),
    (["data.temperature=2"], "no data.mixture of several datasets"),
    (["data.temperature=0"], "data.temperature is 0.0, but must be greater than 0"),
    (["data.image_share=1.5"], "data.image_share is 1.5, but must lie between 0 and 1"),
    (["data.image_share=half"], "data.image_share is 'half', but must be a number")])
def test_mixtures_that_mean_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three datasets of 1, 2 and 3 shards."""
    root = tmp_path_factory.mktemp("mixture")
    for number, name in enumerate(PARTS, 1):
        write_tokens(root / name, range(number), name=f"{name}-")
    return root


def data_of(folders, *repeats: float, **changes) -> DataConfig:
    parts = tuple(MixturePart(str(folders / name), repeats=repeat) for name, repeat in zip(PARTS, repeats))
    return DataConfig(mixture=parts, **{**dict(token_budget=128, window_shards=3, validation_fraction=0.1,
                                               i2v_share=0.5), **changes})


def open_plan(data: DataConfig) -> Plan:
    return Plan.of(Mixture.open(data), data, seed=3)


def steps_on(plan: Plan, state: DataState, dp_size: int, packs_per_step: int, until):
    """What the ranks take, step for step, until `until(state, steps)`; the packs they share must be the same."""
    loaders = [PackLoader(plan, state, packs_per_step=packs_per_step, cost=Cost(100, 1), gamma=0.5, dp_rank=rank,
                          dp_size=dp_size) for rank in range(dp_size)]
    taken = []
    while not until(state, len(taken)):
        ranks = [next(loader) for loader in loaders]
        assert len({len(step.micro_batches) for step in ranks}) == 1
        read = sorted((m.pack for step in ranks for m in step.micro_batches), key=lambda p: p.position)
        assert read == sorted(ranks[0].packs, key=lambda p: p.position)
        taken.append([p for p in read if p.draws])
        state = ranks[0].state_after
    for loader in loaders:
        loader.close()
    return taken, state


@pytest.mark.parametrize(("before", "after"), [((1, 4), (8, 8)), ((8, 8), (2, 2)), ((2, 6), (4, 12))])
def test_three_datasets_are_taken_exactly_once_over_a_stop_and_a_resume_at_another_size(folders, tmp_path, before,
                                                                                        after):
    plan = open_plan(data_of(folders, 1, 1, 1))
    whole, end = steps_on(plan, plan.start(), 1, 1, lambda state, _: state.epoch == 1)
    first, state = steps_on(plan, plan.start(), *before, lambda _, steps: steps == 2)
    state = DataState.from_dict(json.loads(json.dumps(state.to_dict())))
    rest, end_of_resumed = steps_on(open_plan(data_of(folders, 1, 1, 1)), state, *after, lambda s, _: s.epoch == 1)
    packs = [p for step in first + rest for p in step]
    assert packs == [p for step in whole for p in step] and end == end_of_resumed
    taken = Counter((draw.dataset, draw.key) for p in packs for draw in p.draws)
    expected = {(d, row.key) for d, dataset in enumerate(plan.mixture.datasets)
                for shard in range(d + 1) for row in dataset.rows(shard) if not held_out(row.key, 0.1)}
    assert taken == Counter(dict.fromkeys(expected, 1))


def write_ledger(folder, data: DataConfig, epochs: int = 1) -> list:
    (folder / "config.yaml").write_text(config_yaml(Config(seed=3, data=data)))
    plan, step, packs = open_plan(data), 0, []
    state = plan.start()
    while state.epoch < epochs:
        packs, state = plan.next_step(state, 5)
        record_step(folder / "ledger.jsonl", step, packs, state.snapshot)
        step += 1
    return packs


def test_the_ledger_proves_what_the_mixture_says(folders, tmp_path, capsys):
    write_ledger(tmp_path, data_of(folders, 1, 2.5, 0.5), epochs=2)
    ledger = tmp_path / "ledger.jsonl"
    epochs = check_ledger(ledger)
    assert [(e["epoch"], e["exact"], e["finished"]) for e in epochs] == [(0, True, True), (1, True, True)]
    assert [part["visits_of_a_video"] for part in epochs[0]["datasets"]] == [1, 2.5, 0.5]
    assert sum(part["visits"] for part in epochs[0]["datasets"]) == epochs[0]["visits"]
    assert show_ledger(ledger, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == epochs


def test_a_ledger_tells_draws_that_are_missing_taken_again_and_not_of_the_plan(folders, tmp_path):
    data, ledger = data_of(folders, 1, 2.5, 0.5), tmp_path / "ledger.jsonl"
    write_ledger(tmp_path, data, epochs=2)
    lines = ledger.read_text().splitlines()
    second = json.loads(lines[1])["draws"]
    # The first step is left out; the second is taken again in the last, with a strange sample and a strange index.
    again = [[second[0][0], "stranger", 0], [1 << 39, *second[1][1:]], *second[2:]]
    late = json.dumps({**json.loads(lines[1]), "step": 99, "draws": again}, separators=(",", ":"))
    ledger.write_text("\n".join([*lines[1:], late]))
    (broken, sound) = check_ledger(ledger)
    first = json.loads(lines[0])["draws"]
    assert sound["exact"] and not broken["exact"] and broken["finished"]
    assert (broken["missing"], broken["repeated"], broken["foreign"]) == (len(first), len(second) - 2, 2)
    assert {(d["draw"], d["key"], d["dataset"]) for d in broken["first_missing"]} <= set(map(tuple, first))
    assert broken["first_repeated"][0] == {"draw": second[2][0], "dataset": second[2][2], "key": second[2][1],
                                           "step": 99}
    assert [d["key"] for d in broken["first_foreign"]] == ["stranger", second[1][1]]
    shown = list(ledger_lines([broken]))
    assert "WRONG" in shown[0] and f"  foreign: draw {second[0][0]}, sample stranger of dataset 0 in step 99" in shown
    assert any("missing: and" in line for line in shown) == (len(first) > 10) and "data.window_shards" in shown[-1]
    assert show_ledger(ledger, as_json=False) == 1


def test_an_epoch_under_way_must_be_whole_up_to_the_window_it_has_come_to(folders, tmp_path):
    write_ledger(tmp_path, data_of(folders, 1, 1, 1))
    ledger = tmp_path / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]))
    (epoch,) = check_ledger(ledger)
    assert epoch["exact"] and not epoch["finished"] and "so far" in next(ledger_lines([epoch]))
    ledger.write_text("".join(lines[1:-1]))
    (epoch,) = check_ledger(ledger)
    assert not epoch["exact"] and not epoch["finished"] and epoch["missing"] == len(json.loads(lines[0])["draws"])


def test_a_ledger_of_one_dataset_follows_it_to_another_folder(folders, tmp_path):
    write_ledger(tmp_path, DataConfig(dataset=str(folders / "b"), token_budget=128))
    (folders / "b").rename(folders / "moved")
    try:
        (epoch,) = check_ledger(tmp_path / "ledger.jsonl", str(folders / "moved"))
        assert epoch["exact"] and "each sample once" in next(ledger_lines([epoch]))
        with pytest.raises(UserError, match="does not hold|no tokenized dataset"):
            check_ledger(tmp_path / "ledger.jsonl")
    finally:
        (folders / "moved").rename(folders / "b")


def test_ledgers_that_prove_nothing_are_refused(folders, tmp_path):
    packs = write_ledger(tmp_path, data_of(folders, 1))
    record_step(tmp_path / "ledger.jsonl", 1000, packs, "another")
    with pytest.raises(UserError, match="steps of epoch 0 on the snapshots .* and .*not of one run"):
        check_ledger(tmp_path / "ledger.jsonl")
    (tmp_path / "config.yaml").write_text("data: 3\n")
    with pytest.raises(UserError, match="does not say the data section"):
        check_ledger(tmp_path / "ledger.jsonl")


def test_a_ledger_without_steps_or_without_an_epoch_proves_nothing(folders, tmp_path, capsys):
    write_ledger(tmp_path, data_of(folders, 1), epochs=4)
    ledger = tmp_path / "ledger.jsonl"
    lines = [(json.loads(line)["epoch"], line) for line in ledger.read_text().splitlines(keepends=True)]
    assert [epoch["epoch"] for epoch in check_ledger(ledger)] == [0, 1, 2, 3]
    ledger.write_text("".join(line for epoch, line in lines if epoch not in (1, 2)))
    with pytest.raises(UserError, match="no step of the epochs 1 and 2, .*0 .*3"):
        show_ledger(ledger, as_json=False)
    ledger.write_text("".join(line for epoch, line in lines if epoch != 2))
    with pytest.raises(UserError, match="no step of epoch 2"):
        check_ledger(ledger)
    ledger.write_text("".join(line for epoch, line in lines if epoch > 1))  # the run went on with that of another one
    assert show_ledger(ledger, as_json=False) == 0 and "epoch 3" in capsys.readouterr().out
    ledger.write_text("")
    with pytest.raises(UserError, match="has no steps"):
        show_ledger(ledger, as_json=True)
    assert not capsys.readouterr().out


def test_index_plan_shows_a_mixture(folders, tmp_path, capsys):
    data = data_of(folders, 1, 2.5, 0.5, packs_per_step=4)
    (tmp_path / "run.yaml").write_text(config_yaml(Config(seed=3, data=data)))
    argv = ["plan", "--config", str(tmp_path / "run.yaml"), "--world-size", "2", "--steps", "1:3"]
    assert index_command.main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = open_plan(data)
    packs = plan.next_step(plan.state_at(1, 4), 4)[0]
    shown = [s for rank in document["steps"][0]["ranks"] for pack in rank["packs"] for s in pack["samples"]]
    assert sorted((s["draw"], s["dataset"], s["id"]) for s in shown) == sorted(
        (d.index, d.dataset, d.key) for p in packs for d in p.draws)
    assert [part["samples"] for part in document["datasets"]] == [16, 32, 48]
    assert document["expected_visits"] == 16 + 2.5 * 32 + 0.5 * 48
    assert index_command.main(argv) == 0
    assert "visits of an image 2.5, of a video 2.5" in capsys.readouterr().out
    # A dataset on the command line takes the mixture's place.
    assert index_command.main([*argv, "--dataset", str(folders / "c"), "--json"]) == 0
    assert [part["samples"] for part in json.loads(capsys.readouterr().out)["datasets"]] == [48]

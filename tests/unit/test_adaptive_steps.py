"""Complexity-aware sampling: the entropy of an early prediction decides how many steps a sample gets."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from grn_scale.config import load_config
from grn_scale.config.schema import AdaptiveConfig, ModelConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import build_model
from grn_scale.sampling import Condition, SamplingSettings, generate
from grn_scale.sampling.steps import adaptive_progress, progress, steps_after, temperature_factor

CONFIG = ModelConfig(hidden_size=24, num_layers=2, num_heads=2, ffn_hidden_size=32, text_hidden_size=8,
                     latent_channels=2, rounds=2)
RULE = AdaptiveConfig(enabled=True, k=0.0, b=0.0, wp=3, tmin=5)


@pytest.fixture(scope="module", params=["v1", "v2"])
def model(request):
    model = build_model(dataclasses.replace(CONFIG, layout=request.param), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # predictions that differ between samples
    return model.eval()


def conditions(count):
    generator = torch.Generator().manual_seed(0)
    return [Condition(torch.randn(4, 8, generator=generator) * (n + 1), torch.zeros(1, 8), (1 + n % 2, 2, 2), 1.0)
            for n in range(count)]


def settings(**rule):
    return SamplingSettings(steps=12, tmax=12, guidance=2.0, adaptive=dataclasses.replace(RULE, **rule))


def test_steps_follow_the_entropy_within_their_bounds_and_round_half_to_even():
    rule = dataclasses.replace(RULE, k=10.0, b=-1.0)
    assert [steps_after(e, rule, 12) for e in (0.0, 0.35, 0.45, 0.7, 1.0)] == [2, 2, 4, 6, 9]


def test_as_many_steps_as_the_schedule_has_give_the_fixed_schedule():
    assert [adaptive_progress(i, 12, 3, 9) for i in range(12)] == pytest.approx([progress(i, 12) for i in range(12)])
    few = [adaptive_progress(i, 12, 3, 4) for i in range(7)]
    assert few[:3] == [progress(i, 12) for i in range(3)] and few == sorted(few)
    assert few[5:] == pytest.approx([1.0, 1.0]) and max(few) <= 1.0


def test_full_length_adaptive_sampling_equals_the_fixed_run(model):
    asked = conditions(3)
    fixed = generate(model, asked, SamplingSettings(steps=12, tmax=12, guidance=2.0), seed=4)
    full = generate(model, asked, settings(b=100.0), seed=4)
    assert all(map(torch.equal, fixed.labels, full.labels))


def test_each_sample_ends_at_its_own_step_and_then_costs_nothing(model):
    asked, seen = conditions(6), []
    result = generate(model, asked, settings(k=40.0, b=-25.0), seed=1, record=True,
                      observe=lambda maps: seen.append(maps.samples))
    after = result.trace["dynamic_steps"].tolist()
    assert len(set(after)) > 1 and min(after) >= 2 and max(after) <= 9
    assert result.steps == [RULE.wp + int(steps) for steps in after]
    for n, steps in enumerate(after):
        assert sum(n in samples for samples in seen) == RULE.wp + steps
        assert result.trace["cur_pt"][n].shape == (RULE.wp + int(steps),)
    rule = settings(k=40.0, b=-25.0).adaptive
    assert after == [steps_after(e, rule, 12) for e in result.trace["decision_entropy"].tolist()]


def test_what_a_sample_becomes_does_not_depend_on_its_company(model):
    asked, rule = conditions(4), settings(k=40.0, b=-25.0, temperature_factor=True)
    together = generate(model, asked, rule, seed=1).labels
    for n, alone in enumerate(asked):
        assert torch.equal(generate(model, [alone], rule, seed=1, first_draw=n).labels[0], together[n])


def test_a_place_that_becomes_free_is_taken_at_once_and_changes_no_sample(model):
    asked, rule, seen = conditions(9), settings(k=40.0, b=-25.0), []
    room = 3 * max(one.tokens(guided=True) for one in asked)
    queued = generate(model, asked, rule, seed=1, max_tokens=room,
                      observe=lambda maps: seen.append((maps.samples, maps.step, maps.ended)))
    for n, alone in enumerate(asked):
        single = generate(model, [alone], rule, seed=1, first_draw=n)
        assert torch.equal(queued.labels[n], single.labels[0])
        assert (queued.steps[n], queued.entropies[n]) == (single.steps[0], pytest.approx(single.entropies[0], abs=1e-6))
    assert len(set(queued.steps)) > 2
    # Each sample takes its steps one after the other, is told to have ended at its last, and costs no call afterwards.
    for n, steps in enumerate(queued.steps):
        own = [(step, n in ended) for samples, step, ended in seen if n in samples]
        assert own == [(step, step == steps - 1) for step in range(steps)]
    assert sum(len(samples) for samples, _, _ in seen) == sum(queued.steps)


def test_the_network_is_called_for_the_steps_that_samples_take_in_few_full_calls(model):
    asked, rows = conditions(12), []
    room = 4 * max(one.tokens(guided=True) for one in asked)
    hook = next(model.blocks()).register_forward_pre_hook(
        lambda _, inputs: rows.append(len(inputs[1].visual_rows)))
    result = generate(model, asked, settings(k=40.0, b=-25.0), seed=1, max_tokens=room)
    hook.remove()
    rows = [count for count in rows if count]  # texts alone have no visual row
    visual = [2 * one.grid(one.text_states).visual_tokens for one in asked]
    assert sum(rows) == sum(count * steps for count, steps in zip(visual, result.steps))
    # Without refilling, each third of the samples would take as many calls as its slowest sample has steps.
    in_turn = sum(max(result.steps[n:n + 4]) for n in (0, 4, 8))
    assert len(rows) < in_turn


def test_a_recorded_run_replays_from_its_own_draws(model):
    asked, rule = conditions(3), settings(k=40.0, b=-25.0)
    result = generate(model, asked, rule, seed=2, record=True)
    for max_tokens in (10_000, 40):
        again = generate(model, asked, rule, draws=result.trace, max_tokens=max_tokens)
        assert all(map(torch.equal, result.labels, again.labels)) and again.steps == result.steps


def test_certain_predictions_have_entropy_0_and_the_fewest_steps(model):
    certain = build_model(CONFIG, seed=3)
    with torch.no_grad():
        certain.head.proj.weight.mul_(1e6)
    trace = generate(certain.eval(), conditions(1), settings(k=100.0, b=0.0), record=True).trace
    assert trace["decision_entropy"].item() < 1e-3 and trace["dynamic_steps"].item() == 2
    assert not any(torch.isnan(value).any() for value in trace["entropy"])


def test_a_prediction_that_is_not_a_number_is_an_error_and_no_number_of_steps():
    broken = build_model(CONFIG, seed=3)
    with torch.no_grad():
        broken.head.proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="sample 0: the network's prediction is not a number"):
        generate(broken.eval(), conditions(1), settings())


def test_the_temperature_falls_for_samples_with_few_steps(model):
    assert [temperature_factor(n) for n in (0, 10, 20, 30, 45)] == [0.5, 0.5, 0.75, 1.0, 1.0]
    plain, cooled = (generate(model, conditions(1), settings(temperature_factor=on), seed=1, record=True).trace
                     for on in (False, True))
    torch.testing.assert_close(plain["probs"][:3], cooled["probs"][:3], atol=0, rtol=0)
    assert (cooled["probs"][3].max(-1).values >= plain["probs"][3].max(-1).values).all()


def test_guidance_acts_inside_its_interval_only(model):
    inside = SamplingSettings(steps=6, tmax=6, guidance=3.0, guidance_start=0.1, guidance_end=0.6)
    trace = generate(model, conditions(1), inside, record=True).trace
    for share, used in zip(trace["cur_pt"].flatten().tolist(), trace["cfg_used"].flatten().tolist()):
        assert used == (3.0 if 0.1 <= share <= 0.6 else 1.0)


def test_a_rule_that_cannot_be_is_refused():
    for overrides, message in (
            (["sampling.adaptive.tmin=3"], "adaptive.tmin is 3, but must be greater"),
            (["sampling.adaptive.enabled=true", "sampling.tmax=10"], "must not be above sampling.tmax"),
            (["sampling.adaptive.kk=1"], "did you mean sampling.adaptive.k")):
        with pytest.raises(ConfigError, match=message):
            load_config(None, overrides)
    config = load_config(None, ["sampling.adaptive.enabled=true", "sampling.adaptive.k=30"])
    assert SamplingSettings.of(config.sampling, CONFIG).adaptive.k == 30
    assert SamplingSettings.of(load_config(None).sampling, CONFIG).adaptive is None

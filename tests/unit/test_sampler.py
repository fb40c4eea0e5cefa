"""The refinement sampler: recorded traces of the reference, and what a sample may and may not depend on."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from grn_scale.config.schema import ModelConfig
from grn_scale.errors import ConfigError, UserError
from grn_scale.model import GRN, build_model
from grn_scale.sampling import Condition, SamplingSettings, generate
from grn_scale.sampling.choice import choose, probabilities, relative_entropy
from grn_scale.sampling.steps import END_TOLERANCE, is_last, predicted_share, progress
from grn_scale.sampling.waiting import Waiting
from tests.unit.test_model_golden import GOLDEN, golden_config

CASES = json.loads((GOLDEN / "grn_sampler_cases.json").read_text())
TOLERANCE = {"cond_logits": 2e-4, "uncond_logits": 2e-4, "probs": 1e-4, "cur_pt": 1e-6, "next_pt_target": 1e-6,
             "next_pt_realised": 1e-6, "cfg_used": 0.0, "entropy": 1e-5, "initial_labels": 0.0, "sampled_labels": 0.0,
             "use_predict_mask": 0.0, "mixed_labels_out": 0.0, "final_latent": 0.0}
SHAPE = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, ffn_hidden_size=64, num_chunks=1, text_hidden_size=8,
                    latent_channels=4, rounds=2)
SETTINGS = SamplingSettings(steps=5, tmax=5, guidance=2.5)


def recorded(trace: str) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / "grn_sampler_trace.safetensors")
    return {name.removeprefix(trace + "/"): value for name, value in values.items() if name.startswith(trace + "/")}


def golden_model(name: str, layout: str) -> GRN:
    weights = load_file(GOLDEN / "grn_t2iv_state.safetensors")
    model = GRN(golden_config(name, layout))
    model.load_state_dict({k.removeprefix(name + "/"): v for k, v in weights.items() if k.startswith(name + "/")})
    return model


@pytest.fixture(scope="module", params=[("bit", "v2"), ("index", "v2"), ("bit", "v1")], ids="-".join)
def model(request) -> GRN:
    form, layout = request.param
    return lively(dataclasses.replace(SHAPE, label_form=form, layout=layout))


@pytest.fixture(scope="module")
def bit_model() -> GRN:
    return lively(SHAPE)


def lively(config: ModelConfig) -> GRN:
    """A model whose predictions depend visibly on what it reads: initial weights are too small for that."""
    model = build_model(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def condition(number: int, thw=(2, 2, 3), first_frame: bool = False, channels: int = 8) -> Condition:
    generator = torch.Generator().manual_seed(number)
    first = None
    if first_frame:
        first = torch.randint(0, 2, (channels, 1, *thw[1:]), generator=generator).to(torch.uint8)
    return Condition(torch.randn(3 + number % 3, 8, generator=generator), torch.randn(2, 8, generator=generator), thw,
                     1.0, first)


# --- the reference

def recorded_run(trace: str):
    """Model, condition, settings, draws and resulting labels of a recording."""
    case, record, layout = CASES[trace], recorded(trace), trace[:2]
    first = record["first_frame_labels"][0] if case["first_frame_condition"] else None
    settings = SamplingSettings(
        steps=case["max_infer_steps"], tmax=case["Tmax"], guidance=case["guidance"],
        guidance_start=case["cfg_interval"], temperature=case["tau"], shift=case["snr_shift"],
        end_fraction={"v1": 0.999, "v2": 0.95}[layout])
    asked = Condition(record["text_cond"], record["text_uncond"], tuple(case["thw"]), case["ratio_key"], first)
    last = record["sampled_labels"][-1]
    labels = last if first is None else torch.cat((first[None], last), dim=2)
    return golden_model(case["model"], layout), asked, settings, record, labels


@pytest.mark.parametrize("trace", CASES)
def test_recorded_trace_of_the_reference_is_reproduced(trace):
    model, asked, settings, record, labels = recorded_run(trace)
    result = generate(model, [asked], settings, draws=record, record=True)
    inputs = {"text_cond", "text_uncond", "first_frame_labels", "image_u8_bgr"}
    assert set(result.trace) == set(record) - inputs
    for name, value in result.trace.items():
        torch.testing.assert_close(value, record[name], atol=TOLERANCE[name], rtol=0, msg=lambda m: f"{name}: {m}")
    assert torch.equal(result.labels, labels)


# --- what a sample depends on

def test_a_sample_does_not_depend_on_what_it_is_sampled_with(model):
    channels = model.config.label_channels
    asked = [condition(0), condition(1, (1, 3, 2)), condition(2, (3, 2, 2), True, channels), condition(3)]
    together = generate(model, asked, SETTINGS, seed=5).labels
    for n, alone in enumerate(asked):
        assert torch.equal(generate(model, [alone], SETTINGS, seed=5, first_draw=n).labels[0], together[n])
    in_parts = generate(model, asked, SETTINGS, seed=5, max_tokens=30).labels
    assert all(map(torch.equal, in_parts, together))


def test_a_seed_repeats_and_another_seed_or_draw_gives_another_sample(bit_model):
    asked = [condition(0)]
    first = generate(bit_model, asked, SETTINGS, seed=1).labels
    assert torch.equal(first, generate(bit_model, asked, SETTINGS, seed=1).labels)
    assert not torch.equal(first, generate(bit_model, asked, SETTINGS, seed=2).labels)
    assert not torch.equal(first, generate(bit_model, asked, SETTINGS, seed=1, first_draw=1).labels)


def test_recording_changes_no_sample_and_its_trace_replays_it(model):
    asked = [condition(0), condition(1, (1, 3, 2))]
    settings = dataclasses.replace(SETTINGS, guidance_start=0.3)
    plain = generate(model, asked, settings, seed=4).labels
    result = generate(model, asked, settings, seed=4, record=True)
    again = generate(model, asked, settings, draws=result.trace).labels
    for a, b, c in zip(plain, result.labels, again):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("off", [{"guidance": 1.0}, {"guidance_start": 1.5}])
def test_without_guidance_the_unconditional_branch_does_not_run(bit_model, off):
    poisoned = dataclasses.replace(condition(0), negative_text_states=torch.full((2, 8), math.nan))
    settings = dataclasses.replace(SETTINGS, **off)
    expected = generate(bit_model, [condition(0)], dataclasses.replace(SETTINGS, guidance=1.0)).labels
    assert torch.equal(generate(bit_model, [poisoned], settings).labels, expected)
    assert not torch.equal(generate(bit_model, [condition(0)], SETTINGS).labels, expected)


def test_guidance_one_needs_no_negative_text(model):
    bare = dataclasses.replace(condition(0), negative_text_states=None)
    settings = dataclasses.replace(SETTINGS, guidance=1.0)
    labels = generate(model, [condition(0)], settings).labels
    for record in (False, True):
        assert torch.equal(generate(model, [bare], settings, record=record).labels, labels)
    with pytest.raises(UserError, match="negative_text_states"):
        generate(model, [bare], SETTINGS)


def test_guidance_acts_from_its_start_on(bit_model):
    settings = dataclasses.replace(SETTINGS, guidance_start=0.3)
    trace = generate(bit_model, [condition(0)], settings, record=True).trace
    assert torch.equal(trace["cfg_used"], torch.where(trace["cur_pt"] >= 0.3, 2.5, 1.0).double())
    assert set(trace["cfg_used"].tolist()) == {1.0, 2.5}


def test_guided_probabilities_follow_from_both_branches_inside_the_interval_only(model):
    settings = dataclasses.replace(SETTINGS, steps=8, tmax=8, guidance_start=0.1, guidance_end=0.6, temperature=0.8)
    asked = [condition(n, channels=model.config.label_channels) for n in range(2)]
    trace = generate(model, asked, settings, record=True).trace
    used = trace["cfg_used"]
    assert set(used.flatten().tolist()) == {1.0, 2.5}
    assert torch.equal(used != 1, (trace["cur_pt"] >= 0.1) & (trace["cur_pt"] <= 0.6))
    unconditional, conditional = trace["uncond_logits"], trace["cond_logits"]
    weight = used.float()[..., None, None, None]
    expected = ((unconditional + weight * (conditional - unconditional)) / 0.8).softmax(dim=-1)
    torch.testing.assert_close(trace["probs"], expected, atol=2e-5, rtol=0)


def test_a_negative_text_is_what_the_unconditional_branch_reads(model):
    asked = condition(0, channels=model.config.label_channels)
    swapped = dataclasses.replace(asked, text_states=asked.negative_text_states,
                                  negative_text_states=asked.text_states)
    trace, mirrored = (generate(model, [one], SETTINGS, record=True).trace for one in (asked, swapped))
    torch.testing.assert_close(trace["uncond_logits"][0], mirrored["cond_logits"][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(trace["cond_logits"][0], mirrored["uncond_logits"][0], atol=1e-5, rtol=0)
    other = dataclasses.replace(asked, negative_text_states=-asked.negative_text_states)
    labels, others, unguided, unguided_others = (
        generate(model, [one], dataclasses.replace(SETTINGS, guidance=guidance)).labels
        for guidance in (2.5, 1.0) for one in (asked, other))
    assert not torch.equal(labels, others) and torch.equal(unguided, unguided_others)


def test_a_given_first_frame_comes_back_in_front_and_is_read(bit_model):
    given = condition(2, (3, 2, 2), True)
    other = dataclasses.replace(given, first_frame_labels=1 - given.first_frame_labels)
    labels, others = (generate(bit_model, [c], SETTINGS).labels for c in (given, other))
    assert labels.shape == (1, 8, 3, 2, 2) and labels.dtype == torch.uint8
    assert torch.equal(labels[0, :, :1], given.first_frame_labels)
    assert torch.equal(others[0, :, :1], other.first_frame_labels)
    assert not torch.equal(labels[0, :, 1:], others[0, :, 1:])


# --- steps

def test_the_map_keeps_one_noise_and_the_share_fed_is_the_counted_one(bit_model):
    trace = generate(bit_model, [condition(n) for n in range(3)], SETTINGS, seed=9, record=True).trace
    mask = trace["use_predict_mask"].bool()
    expected = torch.where(mask, trace["sampled_labels"], trace["initial_labels"])
    assert torch.equal(trace["mixed_labels_out"], expected)
    share = mask.float().flatten(2).mean(dim=2).double()
    torch.testing.assert_close(trace["next_pt_realised"], share, atol=1e-12, rtol=0)
    assert torch.equal(trace["cur_pt"][1:], trace["next_pt_realised"][:-1]) and not trace["cur_pt"][0].any()
    assert trace["next_pt_target"].shape == (5, 3)
    # 96 labels a sample: five standard deviations.
    assert (share - trace["next_pt_target"]).abs().max() < 5 * 0.5 / math.sqrt(96)


def test_the_schedule_ends_at_its_fraction_and_stays_there():
    shares = [predicted_share(progress(i, 6), 1.0, 0.95) for i in range(8)]
    assert shares == sorted(shares) and shares[4:] == pytest.approx([0.95] * 4)
    assert shares[0] == pytest.approx(0.95 * (1 - math.cos(math.pi / 10)))
    assert predicted_share(0.4, 1001.0, 1.0) == pytest.approx(predicted_share(0.4, 1.0, 1.0))
    assert predicted_share(0.4, 4.0, 1.0) < predicted_share(0.4, 1.0, 1.0)


def test_a_step_is_the_last_one_when_the_map_is_nearly_all_prediction():
    assert [is_last(0, 9, share, END_TOLERANCE["v2"]) for share in (0.97, 0.985, 1.0)] == [False, True, True]
    assert [is_last(0, 9, share, END_TOLERANCE["v1"]) for share in (0.985, 1.0)] == [False, True]
    assert is_last(8, 9, 0.0, END_TOLERANCE["v1"])


def test_samples_may_end_at_different_steps(bit_model):
    settings = dataclasses.replace(SETTINGS, steps=9, tmax=4, end_fraction=0.98)
    asked = [condition(n, (1, 1 + n % 3, 2)) for n in range(6)]
    together = generate(bit_model, asked, settings, record=True)
    steps = [len(values) for values in together.trace["cur_pt"]]
    assert min(steps) < max(steps)
    for n, alone in enumerate(asked):
        single = generate(bit_model, [alone], settings, first_draw=n, record=True)
        assert torch.equal(single.labels[0], together.labels[n]) and len(single.trace["cur_pt"]) == steps[n]
        assert torch.equal(together.trace["sampled_labels"][n][-1], together.labels[n])


def test_an_observer_sees_every_step_and_the_result_last(bit_model):
    asked, seen = [condition(0), condition(2, (3, 2, 2), True)], []
    result = generate(bit_model, asked, SETTINGS, record=True,
                      observe=lambda maps: seen.append((maps, maps.mixed(), maps.predictions())))
    assert [maps.step for maps, _, _ in seen] == list(range(5))
    assert [bool(maps.ended) for maps, _, _ in seen] == [False] * 4 + [True]
    for maps, mixed, _ in seen:
        assert maps.samples == (0, 1)
        assert torch.equal(mixed[0], result.trace["mixed_labels_out"][0][maps.step])
        assert torch.equal(mixed[1][:, :1], asked[1].first_frame_labels)
        assert maps.shares[1] == result.trace["next_pt_realised"][maps.step, 1]
    assert all(map(torch.equal, seen[-1][2], result.labels))


def test_samples_wait_for_room_in_their_order_and_a_long_one_runs_alone():
    assert condition(0).tokens(guided=True) == 12 + 3 + 1 + 12 + 2 + 1 and condition(0).tokens(guided=False) == 16
    waiting = Waiting([4, 4, 3, 20, 1, 1], 10)
    assert waiting.admit([]) == range(0, 2)
    assert waiting.admit([1]) == range(2, 3)
    assert waiting.admit([1, 2]) == waiting.admit([2]) == range(3, 3)  # the small ones do not overtake
    assert waiting.admit([]) == range(3, 4) and waiting.admit([3]) == range(4, 4)
    assert waiting.admit([]) == range(4, 6) and waiting.admit([]) == range(6, 6)


# --- from scores to labels

def test_labels_are_chosen_with_their_probability():
    random = torch.arange(0, 2**32, 2**14)[:, None]
    for scores in (torch.tensor([[0.7]]), torch.tensor([[[0.2, -1.0, 1.5, 0.0]]])):
        labels = choose(scores.expand(len(random), *scores.shape[1:]), 0.8, random)
        expected = probabilities(scores, 0.8)[0, 0]
        counts = torch.bincount(labels[:, 0].long(), minlength=len(expected)) / len(random)
        torch.testing.assert_close(counts, expected, atol=1e-5, rtol=0)


def test_certain_predictions_are_chosen_whatever_the_random_number():
    random = torch.tensor([[0, 2**32 - 1, 0, 2**32 - 1]])
    assert choose(torch.tensor([[200.0, 200.0, -200.0, -200.0]]), 1.0, random).tolist() == [[1, 1, 0, 0]]
    scores = torch.zeros(1, 4, 8)
    scores[0, :2, 7], scores[0, 2:, 0] = 1e4, 1e4
    assert choose(scores, 1.0, random).tolist() == [[7, 7, 0, 0]]


def test_entropy_is_relative_to_the_classes_and_never_nan():
    for scores in (torch.zeros(1, 3), torch.zeros(1, 3, 16)):
        torch.testing.assert_close(relative_entropy(scores), torch.ones(1, 3))
    extreme = torch.tensor([[1e5, -1e5, 200.0]])
    assert relative_entropy(extreme).tolist() == [[0.0, 0.0, 0.0]]
    assert relative_entropy(torch.tensor([[[0.0, 1e5, -1e5, -500.0]]])).tolist() == [[0.0]]


def test_infinite_scores_are_certain_and_give_no_nan():
    inf = math.inf
    assert relative_entropy(torch.tensor([[inf, -inf, 0.0]])).tolist() == [[0.0, 0.0, 1.0]]
    many = torch.tensor([[[0.0, inf, 1.0, -inf], [-inf, -inf, 0.0, -inf], [-inf] * 4, [inf] * 4, [0, 0, -inf, -inf]]])
    assert relative_entropy(many).tolist() == [[0.0, 0.0, 1.0, 1.0, 0.5]]
    random = torch.tensor([[0, 2**32 - 1]])
    assert choose(torch.tensor([[inf, -inf]]), torch.tensor([0.5]), random.flip(1)).tolist() == [[1, 0]]
    assert choose(many[:, :2], 0.5, random).tolist() == [[1, 2]]
    assert not probabilities(many, 0.1).isnan().any()


# --- what is refused

@pytest.mark.parametrize("change,message", [
    ({"text_states": torch.zeros(3, 9)}, "text states are"),
    ({"negative_text_states": torch.zeros(8)}, "text states are"),
    ({"text_states": torch.zeros(0, 8)}, "a text has 0 tokens"),
    ({"negative_text_states": torch.zeros(513, 8)}, "a text has 513 tokens"),
    ({"thw": (0, 2, 2)}, "at least 1"),
    ({"first_frame_labels": torch.zeros(8, 1, 3, 3)}, "first_frame_labels are"),
    ({"thw": (1, 2, 3), "first_frame_labels": torch.zeros(8, 1, 2, 3)}, "at least 2 latents"),
])
def test_a_condition_that_does_not_fit_is_refused(bit_model, change, message):
    with pytest.raises(UserError, match=message):
        generate(bit_model, [dataclasses.replace(condition(0), **change)], SETTINGS)


@pytest.mark.parametrize("change", [{"steps": 0}, {"tmax": 1}, {"temperature": 0.0}, {"shift": -1.0},
                                    {"end_fraction": 0.0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)


def test_draws_must_replace_all_random_numbers(bit_model):
    with pytest.raises(ValueError, match="use_predict_mask"):
        generate(bit_model, [condition(0)], SETTINGS, draws={"initial_labels": [], "sampled_labels": []})
    trace = generate(bit_model, [condition(0)], SETTINGS, record=True).trace
    with pytest.raises(ValueError, match="draws hold 2 steps of sampled_labels, but sample 0 takes more"):
        generate(bit_model, [condition(0)], SETTINGS, draws=trace | {"sampled_labels": trace["sampled_labels"][:2]})
    with pytest.raises(ValueError, match="initial_labels have"):
        generate(bit_model, [condition(1, (1, 2, 3))], SETTINGS, draws=trace)


def test_no_condition_gives_no_label(bit_model):
    result = generate(bit_model, [], SETTINGS)
    assert result.labels == [] and result.trace == {}

"""The class-to-image sampler: recorded traces of the reference, and what an image may and may not depend on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from grn_scale.class_to_image import ClassAdaptiveConfig, ClassGRN, ClassSamplingSettings, generate
from grn_scale.class_to_image.schedule import Schedule
from grn_scale.errors import ConfigError, UserError
from tests.unit.test_class_model import CASES, GOLDEN, SMALL, golden_model, lively

TOLERANCE = {"cond_logits": 2e-4, "uncond_logits": 2e-4, "probs": 1e-4, "entropy": 1e-5, "decision_entropy": 1e-5,
             "raw_dynamic_steps": 1e-3}
"""Names with one; all others are equal to the last bit."""
SETTINGS = ClassSamplingSettings(steps=6, guidance=2.0, guidance_low=0.0, temperature=1.0)
RULE = ClassAdaptiveConfig(enabled=True, k=0.0, b=0.0, wp=2, tmin=4)


def recorded(trace: str) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / "grn_class_trace.safetensors")
    return {name.removeprefix(trace + "/"): value for name, value in values.items() if name.startswith(trace + "/")}


def golden_settings(case: dict) -> ClassSamplingSettings:
    rule = ClassAdaptiveConfig()
    if case["sampling_method"] == "complexity_aware":
        rule = ClassAdaptiveConfig(enabled=True, k=case["complexity_aware_k"], b=case["complexity_aware_b"],
                                   wp=case["complexity_aware_wp"], tmin=case["complexity_aware_tmin"])
    return ClassSamplingSettings(
        steps=case["num_sampling_steps"], schedule="cosine" if case["sampling_method"] == "cosine" else "linear",
        guidance=case["cfg"], guidance_low=case["interval_min"], guidance_high=case.get("interval_max", 1.0),
        temperature=case["tau"], adaptive=rule)


@pytest.fixture(scope="module", params=["bit", "index"])
def model(request) -> ClassGRN:
    return lively(dataclasses.replace(SMALL, label_form=request.param))


def spread(low: int, high: int) -> tuple[ClassGRN, ClassSamplingSettings, list[int]]:
    """A model, adaptive settings and classes whose images take from `low` to `high` steps."""
    model, classes = lively(SMALL), [n % 5 for n in range(8)]
    settings = dataclasses.replace(SETTINGS, steps=high, adaptive=dataclasses.replace(RULE, tmin=low))
    entropy = generate(model, classes, settings, record=True).trace["decision_entropy"]
    slope = (high - low) / (entropy.max() - entropy.min()).item()
    rule = dataclasses.replace(settings.adaptive, k=slope, b=low - RULE.wp - slope * entropy.min().item())
    return model, dataclasses.replace(settings, adaptive=rule), classes


# --- the reference

@pytest.mark.parametrize("trace", CASES["traces"])
def test_recorded_trace_of_the_reference_is_reproduced(trace):
    case, record = CASES["traces"][trace], recorded(trace)
    result = generate(golden_model(case["method"]), record["labels"].tolist(), golden_settings(case), draws=record,
                      record=True)
    assert torch.equal(result.labels, record["final"])
    # The reference goes on computing for a finished image, and keeps probabilities of fixed schedules only.
    assert set(record) - {"torch_seed", "not_finished"} <= set(result.trace)
    for name in set(record) & set(result.trace):
        ours, theirs = result.trace[name], record[name]
        pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else [
            (value, theirs[:len(value), b]) for b, value in enumerate(ours)]
        for value, expected in pairs:
            torch.testing.assert_close(value, expected, atol=TOLERANCE.get(name, 0.0), rtol=0,
                                       msg=lambda m: f"{name}: {m}")
    if "not_finished" in record:
        assert torch.equal(result.steps, record["not_finished"].sum(dim=0))


# --- what an image depends on

@pytest.mark.parametrize("low", [0.3, -0.7])
def test_an_image_does_not_depend_on_what_it_is_sampled_with(model, low):
    settings, classes = dataclasses.replace(SETTINGS, guidance_low=low), [0, 4, 2, 5, 0]
    together = generate(model, classes, settings, seed=5)
    assert together.labels.shape == (5, model.config.label_channels, 3, 3)
    assert together.labels.dtype == torch.uint8 and together.steps.tolist() == [6] * 5
    for n, class_id in enumerate(classes):
        assert torch.equal(generate(model, [class_id], settings, seed=5, first_draw=n).labels[0], together.labels[n])
    assert torch.equal(generate(model, classes, settings, seed=5, max_images=2).labels, together.labels)
    assert not torch.equal(together.labels[0], together.labels[4])
    assert not torch.equal(generate(model, classes, settings, seed=6).labels, together.labels)


def test_recording_changes_no_image_and_its_trace_replays_it():
    model, settings, classes = spread(4, 9)
    plain = generate(model, classes, settings, seed=4)
    result = generate(model, classes, settings, seed=4, record=True)
    again = generate(model, classes, settings, draws=result.trace)
    assert torch.equal(plain.labels, result.labels) and torch.equal(again.labels, result.labels)
    assert torch.equal(plain.steps, again.steps) and plain.trace == {}


def test_the_trace_of_a_single_image_keeps_its_axis(model):
    trace = generate(model, [1], SETTINGS, record=True).trace
    assert trace["t"].shape == (6, 1) and trace["labels"].tolist() == [1]
    assert trace["cond_logits"].shape == (6, 1, model.config.classes, model.config.label_channels, 3, 3)
    assert trace["probs"].shape == (6, 1, model.config.label_channels, 3, 3, model.config.classes)


def test_the_map_keeps_one_noise_and_ends_as_prediction(model):
    result = generate(model, [0, 1], SETTINGS, record=True)
    trace = result.trace
    mask = trace["use_predict_mask"].bool()
    assert torch.equal(trace["labels_out"], torch.where(mask, trace["sampled_labels"], trace["initial_labels"]))
    assert torch.equal(trace["labels_in"][1:], trace["labels_out"][:-1])
    assert torch.equal(result.labels, trace["sampled_labels"][-1]) and mask[-1].all()


def test_without_guidance_the_unconditional_branch_does_not_run(model):
    rows = []
    original = model.hidden
    model.hidden = lambda labels, signal, class_id: rows.append(len(labels)) or original(labels, signal, class_id)
    try:
        generate(model, [0, 1], dataclasses.replace(SETTINGS, guidance=1.0))
        generate(model, [0, 1], dataclasses.replace(SETTINGS, guidance_low=0.4, guidance_high=0.6))
    finally:
        del model.hidden
    assert rows == [2] * 6 + [2, 2, 2, 4, 2, 2]


# --- steps

def test_signal_levels_of_the_fixed_schedules():
    linear = Schedule(ClassSamplingSettings(steps=8)).fixed_times()
    assert linear.tolist() == [i / 8 for i in range(9)]
    cosine = Schedule(ClassSamplingSettings(steps=8, schedule="cosine")).fixed_times()
    expected = torch.tensor([1 - math.cos(math.pi / 2 * i / 8) for i in range(9)])
    torch.testing.assert_close(cosine, expected, atol=1e-6, rtol=0)
    assert cosine[-1] == 1


def test_guidance_acts_inside_its_interval_or_grows():
    times = torch.tensor([0.0, 0.3, 0.31, 0.9])
    settings = ClassSamplingSettings(guidance=3.0, guidance_low=0.3, guidance_high=0.9)
    assert Schedule(settings).guidances(times).tolist() == [1, 1, 3, 1]
    assert Schedule(dataclasses.replace(settings, guidance_low=0.0)).guidances(times).tolist() == [3, 3, 3, 1]
    grown = Schedule(dataclasses.replace(settings, guidance_low=-2.0)).guidances(torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(grown, torch.tensor([1, 1 + 1.5 * (1 - math.cos(math.pi / 4)), 4]))


def test_a_finished_image_leaves_the_batch():
    model, settings, classes = spread(4, 9)
    seen = []
    result = generate(model, classes, settings, observe=seen.append)
    steps = result.steps.tolist()
    assert min(steps) == 4 and max(steps) == 9 and len(set(steps)) > 2
    assert [len(maps.samples) for maps in seen] == [sum(n > i for n in steps) for i in range(9)]
    for maps in seen:
        assert maps.ended == {n for n, taken in enumerate(steps) if taken == maps.step + 1}
        for n, mixed, predicted in zip(maps.samples, maps.mixed(), maps.predictions()):
            assert mixed.shape == predicted.shape == (3, 1, 3, 3)
            assert n not in maps.ended or torch.equal(mixed[:, 0], result.labels[n])
    for n, class_id in enumerate(classes):
        alone = generate(model, [class_id], settings, first_draw=n)
        assert torch.equal(alone.labels[0], result.labels[n]) and alone.steps[0] == steps[n]


def test_few_steps_lower_the_temperature():
    rule = ClassAdaptiveConfig(enabled=True)
    settings = ClassSamplingSettings(steps=50, temperature=2.0, adaptive=rule)
    after = torch.tensor([10, 20, 30, 45])
    assert Schedule(settings).temperatures(4, after).tolist() == [2.0] * 4
    assert Schedule(settings).temperatures(5, after).tolist() == [1.0, 1.5, 2.0, 2.0]
    for change in ({"enabled": False}, {"temperature_factor": False}):
        plain = dataclasses.replace(settings, adaptive=dataclasses.replace(rule, **change))
        assert Schedule(plain).temperatures(5, after).tolist() == [2.0] * 4


def test_certain_predictions_leave_the_entropy_a_number():
    model = lively(SMALL)
    with torch.no_grad():
        model.final_layer.linear.bias[0] = 1e5
    settings = dataclasses.replace(SETTINGS, adaptive=dataclasses.replace(RULE, k=10.0, b=2.0))
    trace = generate(model, [0, 1], settings, record=True).trace
    assert trace["decision_entropy"].isfinite().all()
    assert all(values.isfinite().all() for values in trace["entropy"])


# --- what is refused

def test_unknown_classes_and_foreign_draws_are_refused(model):
    with pytest.raises(UserError, match="class id 6"):
        generate(model, [0, 6], SETTINGS)
    trace = generate(model, [0], SETTINGS, record=True).trace
    with pytest.raises(ValueError, match="initial_labels are"):
        generate(model, [0], SETTINGS, draws=trace | {"initial_labels": trace["initial_labels"][..., :2]})
    with pytest.raises(ValueError, match="use_predict_mask"):
        generate(model, [0], SETTINGS, draws={"initial_labels": [], "sampled_labels": []})


@pytest.mark.parametrize("change", [{"steps": 0}, {"temperature": 0.0}, {"schedule": "square"}, {"guidance": -1.0},
                                    {"steps": 3, "adaptive": RULE}, {"schedule": "cosine", "adaptive": RULE}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ConfigError, match="sampling"):
        dataclasses.replace(SETTINGS, **change)


def test_no_class_gives_no_image(model):
    result = generate(model, [], SETTINGS)
    assert len(result.labels) == 0 and len(result.steps) == 0 and result.trace == {}

"""Texts of layout v1 are computed once for all refinement steps, and the steps give the same scores as whole packs."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager

import pytest
import torch

from grn_scale.config.schema import AdaptiveConfig, ModelConfig
from grn_scale.model import GRN, Sample, build_model
from grn_scale.model.text_cache import TextCache
from grn_scale.sampling import Condition, SamplingSettings, generate
from grn_scale.sampling.guidance import GuidedNetwork

CONFIG = ModelConfig(hidden_size=48, num_layers=4, num_heads=3, ffn_hidden_size=64, num_chunks=2, text_hidden_size=8,
                     latent_channels=2, rounds=2, layout="v1")
SETTINGS = SamplingSettings(steps=6, tmax=6, guidance=2.0)


@pytest.fixture(scope="module", params=["bit", "index"])
def model(request) -> GRN:
    model = build_model(dataclasses.replace(CONFIG, label_form=request.param), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # predictions that depend visibly on the text
    return model.eval()


def conditions(model: GRN, shapes=((2, 2, 3), (1, 2, 2), (3, 1, 2), (1, 2, 2)), negative=None) -> list[Condition]:
    """One I2V sample among them; texts of several lengths."""
    generator = torch.Generator().manual_seed(0)
    config, found = model.config, []
    for n, (t, h, w) in enumerate(shapes):
        first = None
        if n == 2:
            first = torch.randint(0, config.classes, (config.label_channels, 1, h, w), generator=generator).byte()
        own = torch.randn(2, 8, generator=generator) if negative is None else negative
        found.append(Condition(torch.randn(3 + n % 2, 8, generator=generator), own, (t, h, w), 1.0, first))
    return found


@contextmanager
def rows_of_projections(model: GRN):
    """Rows that each call of the first and of the last block's k_proj is given, in two lists."""
    blocks = list(model.blocks())
    first, last = [], []
    hooks = [block.attn.k_proj.register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
             for block, seen in ((blocks[0], first), (blocks[-1], last))]
    yield first, last
    for hook in hooks:
        hook.remove()


def visual_rows(condition: Condition) -> int:
    """Of one branch, the noise level's included."""
    return condition.grid(condition.text_states).visual_tokens + 1


def test_scores_are_those_of_the_whole_packed_sequence_at_every_noise_level(model):
    asked = conditions(model)
    generator = torch.Generator().manual_seed(1)
    network = GuidedNetwork(model, asked)
    for shares in ([0.0] * 4, [0.1, 0.9, 0.4, 0.7]):
        maps = [torch.randint(0, model.config.classes, (model.config.label_channels, *one.predicted_thw),
                              generator=generator).byte() for one in asked]
        whole = [labels if one.first_frame_labels is None else torch.cat((one.first_frame_labels, labels), dim=1)
                 for one, labels in zip(asked, maps)]
        with torch.inference_mode():
            got = network(torch.cat([labels.flatten(1).t() for labels in maps]), shares, [2.0, 1.0, 2.0, 3.0],
                          always_both=True)
            expected = [model.logits([
                Sample(labels, getattr(one, name), share, one.ratio_key, one.first_frame_labels is not None)
                for one, labels, share in zip(asked, whole, shares)]) for name in ("text_states",
                                                                                   "negative_text_states")]
            for states, logits in zip((got.conditional_PC, got.unconditional_UC), expected):
                torch.testing.assert_close(model.head.logits(states), torch.cat(logits), atol=1e-5, rtol=1e-5)
    assert torch.cat(expected[0]).std() > 0.05  # not equal because all is nearly zero


def test_text_rows_are_computed_once_for_all_steps(model):
    asked = conditions(model)
    texts = sum(len(one.text_states) + len(one.negative_text_states) for one in asked)
    step = sum(2 * visual_rows(one) for one in asked)
    with rows_of_projections(model) as seen:
        generate(model, asked, SETTINGS)
    for rows in seen:
        assert rows == [texts] + [step] * SETTINGS.steps


def test_a_text_that_samples_share_is_computed_once_and_without_guidance_no_negative_one(model):
    negative = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    asked = conditions(model, negative=negative)
    conditional = sum(len(one.text_states) for one in asked)
    with rows_of_projections(model) as (rows, _):
        generate(model, asked, SETTINGS)
    assert rows[0] == conditional + 5 and set(rows[1:]) == {sum(2 * visual_rows(one) for one in asked)}
    with rows_of_projections(model) as (rows, _):
        generate(model, asked, dataclasses.replace(SETTINGS, guidance=1.0))
    assert rows == [conditional] + [sum(map(visual_rows, asked))] * SETTINGS.steps


def test_guidance_that_comes_and_goes_computes_a_negative_text_once(model):
    asked = conditions(model)[:1]
    settings = dataclasses.replace(SETTINGS, steps=12, tmax=12, guidance_start=0.1, guidance_end=0.5)
    with rows_of_projections(model) as (rows, _):
        generate(model, asked, settings)
    visual = visual_rows(asked[0])
    texts = [count for count in rows if count not in (visual, 2 * visual)]
    assert texts == [3, 2] and rows[0] == 3
    assert rows.count(2 * visual) > 0 and rows.count(visual) > 1


def test_samples_that_come_and_go_have_their_texts_computed_once_and_forgotten(model, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    negative = torch.randn(6, 8, generator=generator)
    asked = [Condition(torch.randn(2 + n % 3, 8, generator=generator) * n, negative, (1, 2, 2), 1.0) for n in range(8)]
    rule = AdaptiveConfig(enabled=True, k=60.0, b=-44.0, wp=2, tmin=3)
    settings = SamplingSettings(tmax=12, guidance=2.0, adaptive=rule)
    most, held = 3 * 20, []
    keep = TextCache.keep

    def watched(cache, texts):
        keep(cache, texts)
        held.append([len(layer.keys) for layer in cache._layers])

    monkeypatch.setattr(TextCache, "keep", watched)
    with rows_of_projections(model) as (rows, _):
        result = generate(model, asked, settings, max_tokens=most)
    assert len(set(result.steps)) > 1
    # 5 rows a branch, so a call's rows are a multiple of 10; what is left over are the texts.
    texts = sum(len(one.text_states) for one in asked) + len(negative)
    assert sum(rows) == texts + sum(2 * 5 * steps for steps in result.steps)
    # What is kept for the next call is the negative text and the prompts of at most the two that go on.
    assert all(len(set(layers)) == 1 and layers[0] <= 6 + 2 * 4 for layers in held)
    for n, alone in enumerate(asked):
        single = generate(model, [alone], settings, first_draw=n)
        assert torch.equal(single.labels[0], result.labels[n])


def test_a_cache_gives_the_rows_of_each_text_whatever_was_forgotten_before(model):
    texts = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 2, 3, 2)]
    cache = TextCache(model)
    with torch.inference_mode():
        assert cache.starts(texts[:2]) == [2, 0]  # shorter ones stand first
        assert cache.starts([texts[2], texts[0]]) == [6, 2]
        cache.keep([texts[2], texts[0]])
        starts = cache.starts([texts[3], texts[0], texts[2], texts[3]])
        assert starts == [7, 0, 4, 7] and len(cache._layers[0].keys) == 9
        for text, start in zip((texts[3], texts[0], texts[2]), starts):
            alone = TextCache(model)
            assert alone.starts([text]) == [0]
            for own, layer in zip(alone._layers, cache._layers, strict=True):
                for name in ("keys", "values"):
                    torch.testing.assert_close(getattr(layer, name)[start:start + len(text)], getattr(own, name),
                                               atol=1e-5, rtol=1e-5)
        cache.keep([])
        assert len(cache._layers[0].keys) == 0


def test_layout_v2_has_nothing_to_keep():
    with pytest.raises(ValueError, match="layout v2 depend on the noise"):
        TextCache(build_model(dataclasses.replace(CONFIG, layout="v2")))

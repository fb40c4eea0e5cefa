"""The plain torch model against recorded tensors of the reference (golden/manifest.json)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grn_scale import hbq
from grn_scale.data.plan import sample_weights
from grn_scale.model import GRN, Sample
from grn_scale.model.loss import LabelLoss, label_loss
from grn_scale.model.pack import PackedBatch
from tests.helpers.golden import (
    ALL_CASES,
    CASES,
    GAMMA,
    GOLDEN,
    GRADIENTS,
    LOGITS,
    LOSSES,
    GoldenCase,
    case_id,
    golden_config,
    golden_state,
)

__all__ = ["CASES", "GOLDEN", "golden_config"]

cases = pytest.mark.parametrize("recorded", ALL_CASES, ids=case_id)


def plain_model(recorded: GoldenCase) -> GRN:
    model = GRN(recorded.config)
    model.load_state_dict(golden_state(recorded.model))
    return model


def scored(model: GRN, batch: PackedBatch) -> LabelLoss:
    return label_loss(model(batch.input), batch.targets_PD, batch.sample_P, batch.label_weight_N)


@pytest.mark.parametrize("layout,case", [(v, c) for v in ("v1", "v2") for c in CASES[v]])
def test_logits_equal_the_reference(layout: str, case: str) -> None:
    recorded = GoldenCase(layout, case)
    model = GRN(recorded.config)
    model.load_state_dict(golden_state(recorded.model))
    samples = [Sample(recorded.mixed(i), recorded.of(i, "text"), float(recorded.of(i, "pt_used")), s["ratio_key"],
                      s["first_frame_condition"]) for i, s in enumerate(recorded.samples)]
    with torch.no_grad():
        outputs = model.logits(samples)
    for i, logits in enumerate(outputs):
        torch.testing.assert_close(logits, recorded.of(i, "logits"), atol=LOGITS, rtol=0)


@cases
def test_labels_and_targets_are_those_of_the_reference(recorded: GoldenCase) -> None:
    config, batch = recorded.config, recorded.batch(GAMMA[recorded.layout])
    quantise = hbq.quantize_bits if config.label_form == "bit" else hbq.quantize_index
    targets = []
    for i, described in enumerate(recorded.samples):
        labels, keep = recorded.of(i, "labels"), recorded.of(i, "keep_mask").bool()
        assert torch.equal(quantise(recorded.of(i, "features"), config.rounds), labels)
        mixed = torch.where(keep, labels, recorded.of(i, "random_labels"))
        assert torch.equal(mixed, recorded.of(i, "mixed_labels"))
        fed = recorded.of(i, "pt_sampled" if recorded.layout == "v1" else "pt_fraction")
        assert torch.equal(fed, recorded.of(i, "pt_used"))
        assert keep.double().mean().item() == pytest.approx(recorded.of(i, "pt_fraction").item(), abs=1e-7)
        # One-hot input: channel = label channel * classes + class; the clean frame stands behind the noisy ones.
        tokens = recorded.mixed(i).flatten(1).t().long()
        frame = tokens.shape[0] // described["thw"][0] * described["first_frame_condition"]
        tokens = torch.cat((tokens[frame:], tokens[:frame]))
        one_hot = F.one_hot(tokens, config.classes).flatten(1)
        assert torch.equal(one_hot, recorded.of(i, "onehot_input")[0].long())
        targets.append(recorded.of(i, "target")[0])
    assert torch.equal(batch.targets_PD, torch.cat(targets))
    assert torch.equal(batch.sample_P.bincount(), torch.tensor([len(t) for t in targets]))


@cases
def test_states_equal_the_reference_from_the_embedding_to_the_last_block(recorded: GoldenCase) -> None:
    model, batch = plain_model(recorded), recorded.batch(0.0)
    layout, states = batch.input.layout, {}
    model.block_chunks[0].module[0].register_forward_hook(
        lambda _, inputs, output: states.__setitem__("embed_sequence", inputs[0]))
    for number, chunk in enumerate(model.block_chunks):
        chunk.module[-1].register_forward_hook(
            lambda _, inputs, output, n=number: states.__setitem__(f"after_chunk{n}", output))
    with torch.no_grad():
        model(batch.input)
    visual, text = 0, 0
    for i, described in enumerate(recorded.samples):
        first_visual, visuals, first_text, texts, level = recorded.of(i, "offsets").tolist()
        t, h, w = described["thw"]
        own = layout.visual_rows[visual:visual + t * h * w]
        frame = h * w * described["first_frame_condition"]
        ours = torch.cat((own[frame:], own[:frame], layout.text_rows[text:text + texts], layout.level_rows[i:i + 1]))
        theirs = torch.cat((torch.arange(first_visual, first_visual + visuals),
                            torch.arange(first_text, first_text + texts), torch.tensor([level])))
        visual, text = visual + len(own), text + texts
        for name, table in (("rope_cos", layout.cos), ("rope_sin", layout.sin)):
            torch.testing.assert_close(table[ours], recorded[name][theirs], atol=1e-6, rtol=0)
        for name, values in states.items():
            torch.testing.assert_close(values[ours], recorded[name][0][theirs], atol=LOGITS, rtol=0)
    assert set(states) == {"embed_sequence"} | {f"after_chunk{n}" for n in range(recorded.config.num_chunks)}
    padding = torch.ones(layout.length, dtype=torch.bool)
    padding[torch.cat((layout.visual_rows, layout.text_rows, layout.level_rows))] = False
    assert padding.any() and all(not values[padding].any() for values in states.values())


@cases
@pytest.mark.parametrize("gamma", sorted(set(GAMMA.values())))
def test_losses_of_a_pack_equal_the_reference(recorded: GoldenCase, gamma: float) -> None:
    batch = recorded.batch(gamma)
    with torch.no_grad():
        loss = scored(plain_model(recorded), batch)
    for name, found in (("loss", loss.sample_loss_N), ("acc", loss.sample_correct_N)):
        torch.testing.assert_close(found / batch.labels_N, recorded[f"per_sample_{name}"], atol=LOSSES, rtol=0)
        per_token = torch.stack([recorded.of(i, f"{name}_per_token").mean() for i in range(len(recorded.samples))])
        torch.testing.assert_close(found / batch.labels_N, per_token, atol=LOSSES, rtol=0)
    weights = torch.tensor(list(sample_weights([recorded.pack()], gamma).values()))
    torch.testing.assert_close(weights, recorded.weights(gamma), atol=1e-7, rtol=0)
    expected = (recorded.weights(gamma) * recorded["per_sample_loss"]).sum()
    torch.testing.assert_close(loss.weighted, expected, atol=LOSSES, rtol=0)
    if gamma == GAMMA[recorded.layout]:
        torch.testing.assert_close(weights, recorded["sample_weight"], atol=1e-6, rtol=0)
        torch.testing.assert_close(loss.weighted, recorded["final_loss"][0], atol=LOSSES, rtol=0)


@cases
def test_gradients_equal_the_reference(recorded: GoldenCase) -> None:
    model = plain_model(recorded)
    scored(model, recorded.batch(GAMMA[recorded.layout])).weighted.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = recorded.under("grad_norm/")
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm.item(), rel=GRADIENTS), name
    for name, gradient in recorded.under("grad/").items():
        assert (gradients[name] - gradient).norm() <= GRADIENTS * gradient.norm(), name

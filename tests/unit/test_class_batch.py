"""Training batches of the class-to-image model: keyed corruption, dropped classes, loss weights, and learning."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from grn_scale.batch import Draw, Sample
from grn_scale.class_to_image import build_model
from grn_scale.class_to_image.batch import ClassBatch, assemble, batch_loss, corrupt
from grn_scale.config.schema import NoiseConfig
from grn_scale.errors import UserError
from grn_scale.model.pack import sample_labels
from grn_scale.model.refinement import corrupt as corrupt_packed
from grn_scale.model.sequence import Grid, lay_out
from tests.unit.test_class_model import SMALL

NOISE = NoiseConfig(mean=-0.8, sigma=0.8)
CPU = torch.device("cpu")
CONFIGS = {form: dataclasses.replace(SMALL, label_form=form) for form in ("bit", "index")}


def sample(index: int, valid: bool = True, side: int = 3) -> Sample:
    draw = Draw(index, f"k{index}", index, (1, side, side), 1.0, "T2I", -1, 1)
    bits = np.random.default_rng(index).integers(0, 256, 7, dtype=np.uint8)
    return Sample(draw, bits, torch.zeros(1, 4), valid)


def batch_of(indices, config=SMALL, class_drop=0.0, **changes) -> ClassBatch:
    samples = [sample(i, **changes) for i in indices]
    return assemble(samples, {i: 1 / len(samples) for i in indices}, class_of=lambda draw: draw.row % 5, config=config,
                    noise=NOISE, class_drop=class_drop, seed=7, device=CPU)


@pytest.mark.parametrize("form", CONFIGS)
def test_corruption_is_that_of_the_packed_model(form):
    config = CONFIGS[form]
    labels = torch.stack([sample_labels(sample(i), config) for i in (3, 8)])
    layout = lay_out([Grid((1, 3, 3), 1.0, 0)] * 2, "v2", 4)
    packed, share = corrupt_packed(labels.flatten(0, 1), layout, [0.3, 0.7], [3, 8], 7, config.classes)
    mixed = corrupt(labels, [0.3, 0.7], [3, 8], 7, config.classes)
    assert torch.equal(mixed.flatten(0, 1), packed)
    assert 0 < share[0] < share[1] < 1


@pytest.mark.parametrize("form", CONFIGS)
def test_a_draw_is_the_same_in_any_batch(form):
    together, alone = batch_of([4, 9, 2], CONFIGS[form], 0.5), batch_of([9], CONFIGS[form], 0.5)
    for name in ("labels", "class_B", "ratio_N"):
        assert torch.equal(getattr(together, name)[1], getattr(alone, name)[0]), name
    assert torch.equal(together.targets_PD[9:18], alone.targets_PD)
    assert together.labels.shape == (3, CONFIGS[form].label_channels, 3, 3)


def test_classes_are_dropped_with_their_probability():
    indices = range(600)
    kept = batch_of(indices).class_B
    assert kept.tolist() == [i % 5 for i in indices]
    dropped = batch_of(indices, class_drop=0.1).class_B
    share = (dropped == SMALL.null_class).double().mean().item()
    assert abs(share - 0.1) < 5 * (0.09 / 600) ** 0.5
    assert torch.equal(dropped[dropped != SMALL.null_class], kept[dropped != SMALL.null_class])


@pytest.mark.parametrize("form", CONFIGS)
def test_the_loss_of_a_batch_is_the_mean_over_its_labels(form):
    config = CONFIGS[form]
    model, batch = build_model(config, 1), batch_of(range(4), config)
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
    targets = batch.targets_PD.view(4, 9, -1).transpose(1, 2).view(4, -1, 3, 3)
    expected = model.loss(batch.labels, batch.ratio_N, batch.class_B, targets)
    torch.testing.assert_close(batch_loss(model, batch).weighted, expected)


def test_a_corrupt_sample_counts_nothing():
    samples = [sample(0), sample(1, valid=False)]
    batch = assemble(samples, {0: 0.5, 1: 0.5}, class_of=lambda draw: 0, config=SMALL, noise=NOISE, class_drop=0.0,
                     seed=7, device=CPU)
    assert batch.labels_N.tolist() == [27, 0] and batch.label_weight_N[1] == 0
    assert batch.label_weight_N[0].item() == pytest.approx(0.5 / 27)


@pytest.mark.parametrize("form", CONFIGS)
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero(form):
    model = build_model(CONFIGS[form], 1)
    loss = batch_loss(model, batch_of([], CONFIGS[form])).weighted
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_model_learns_labels_that_follow_from_the_class():
    config, noise = SMALL, NoiseConfig(mean=0.0, sigma=0.0)
    model = build_model(config, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    pictures = [sample(i).bits for i in range(5)]
    losses = []
    for step in range(60):
        draws = [sample(step * 10 + i) for i in range(10)]
        samples = [dataclasses.replace(s, bits=pictures[s.draw.row % 5]) for s in draws]
        batch = assemble(samples, {s.draw.index: 0.1 for s in samples}, class_of=lambda draw: draw.row % 5,
                         config=config, noise=noise, class_drop=0.1, seed=7, device=CPU)
        loss = batch_loss(model, batch).weighted
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("class_id,side,message", [
    (None, 3, "no class_id"), (5, 3, "class 5"), (0, 2, "1 x 2 x 2 latents")])
def test_samples_that_the_model_cannot_train_on_are_named(class_id, side, message):
    with pytest.raises(UserError, match=message):
        assemble([sample(0, side=side)], {0: 1.0}, class_of=lambda draw: class_id, config=SMALL, noise=NOISE,
                 class_drop=0.0, seed=7, device=CPU)

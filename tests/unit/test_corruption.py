"""Training's noise (GRN reference, section 5): how much, on which labels, and what the network is told of it."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from grn_scale import batch, hbq
from grn_scale.config.schema import ModelConfig, NoiseConfig, ScheduleConfig
from grn_scale.model import build_model
from grn_scale.model.pack import assemble
from grn_scale.model.refinement import corrupt, shift_ratio, signal_ratio
from grn_scale.model.sequence import Grid, lay_out
from grn_scale.train.schedule import learning_rate

SEED = 11


def mixed_and_share(thw, ratio: float, *, draw: int = 5, channels: int = 6, classes: int = 2,
                    first_frame: bool = False) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(mixed labels, where they follow the truth, the share that is told) of one sample.

    A label that was kept changes with the truth, the others do not: so the same noise on another truth shows the mask.
    """
    layout = lay_out([Grid(thw, 1.0, 3, first_frame)], "v2", 8)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, classes, (math.prod(thw), channels), generator=generator).to(torch.uint8)
    mixed, share = corrupt(labels, layout, [ratio], [draw], SEED, classes)
    other, _ = corrupt(labels ^ 1, layout, [ratio], [draw], SEED, classes)
    kept = mixed != other
    assert torch.equal(mixed[kept], labels[kept])
    return mixed, kept, share.item()


# --- how much

def test_the_shift_moves_towards_noise_and_keeps_the_ends():
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert shift_ratio(p, 1.0) == shift_ratio(p, 1001.0) == pytest.approx(p)
        assert shift_ratio(p, 4.0) == shift_ratio(p, 1004.0)
        n = 1 - p
        assert shift_ratio(p, 4.0) == pytest.approx(1 - 4 * n / (1 + 3 * n))
    assert shift_ratio(0.5, 4.0) == pytest.approx(0.2) and shift_ratio(0.5, 0.25) == pytest.approx(0.8)
    assert (shift_ratio(0.0, 4.0), shift_ratio(1.0, 4.0)) == (0.0, 1.0)


def test_signal_ratios_are_the_sigmoid_of_normal_numbers():
    noise = NoiseConfig(mean=-1.3, sigma=1.3)
    ratios = [signal_ratio(SEED, draw, noise) for draw in range(4000)]
    logits = [math.log(p / (1 - p)) for p in ratios]
    assert statistics.mean(logits) == pytest.approx(-1.3, abs=5 * 1.3 / math.sqrt(4000))
    assert statistics.stdev(logits) == pytest.approx(1.3, rel=0.06)
    shifted = [signal_ratio(SEED, draw, NoiseConfig(mean=-1.3, sigma=1.3, shift=3.0)) for draw in range(9)]
    assert shifted == [shift_ratio(p, 3.0) for p in ratios[:9]]
    assert ratios[:9] != [signal_ratio(SEED + 1, draw, noise) for draw in range(9)]


def test_signal_ratios_are_uniform_where_sigma_is_zero():
    ratios = sorted(signal_ratio(SEED, draw, NoiseConfig(sigma=0.0)) for draw in range(4000))
    assert max(abs(p - (i + 0.5) / 4000) for i, p in enumerate(ratios)) < 1.6 / math.sqrt(4000)


# --- on which labels

@pytest.mark.parametrize("classes", [2, 16, 256])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 1.0])
def test_a_label_stays_with_its_probability_or_becomes_any_class_alike(ratio: float, classes: int) -> None:
    mixed, kept, share = mixed_and_share((4, 16, 16), ratio, channels=8, classes=classes)
    count = kept.numel()
    assert share == pytest.approx(kept.double().mean().item(), abs=1e-7)
    assert share == pytest.approx(ratio, abs=5 * math.sqrt(ratio * (1 - ratio) / count))
    noise = mixed[~kept].long()
    if len(noise):
        # Any class, the true one included: chi-squared of a uniform choice, five standard deviations.
        expected = len(noise) / classes
        chi = ((torch.bincount(noise, minlength=classes) - expected) ** 2 / expected).sum().item()
        assert len(torch.bincount(noise)) <= classes and chi < classes + 5 * math.sqrt(2 * classes)


def test_each_label_of_a_token_is_drawn_for_itself():
    _, kept, _ = mixed_and_share((2, 16, 16), 0.5, channels=8)
    by_token = kept.double().mean(dim=1)
    assert by_token.std().item() == pytest.approx(0.5 / math.sqrt(8), rel=0.15)
    assert (torch.corrcoef(kept.double().t()) - torch.eye(8)).abs().max() < 0.25


def test_a_given_first_frame_is_clean_but_counts_in_the_share():
    thw = (3, 4, 4)
    video, kept, share = mixed_and_share(thw, 0.4)
    given, clean, told = mixed_and_share(thw, 0.4, first_frame=True)
    assert told == share and clean[:16].all() and not kept[:16].all()
    assert torch.equal(given[16:], video[16:])


def test_noise_belongs_to_the_draw_whatever_it_is_packed_with():
    grids = [Grid((1, 2, 3), 1.0, 2), Grid((3, 2, 2), 1.333, 9, True), Grid((2, 3, 3), 0.75, 1)]
    labels = [torch.randint(0, 2, (grid.visual_tokens, 6)).to(torch.uint8) for grid in grids]
    together, shares = corrupt(torch.cat(labels), lay_out(grids, "v1", 8, 128), [0.2, 0.5, 0.7], [4, 1 << 61, 7], SEED,
                               2)
    for i in (2, 0, 1):
        alone, share = corrupt(labels[i], lay_out([grids[i]], "v2", 8), [[0.2, 0.5, 0.7][i]], [[4, 1 << 61, 7][i]],
                               SEED, 2)
        assert torch.equal(alone, together.split([len(part) for part in labels])[i]) and share == shares[i]


# --- what the network is told, and scored on

@pytest.mark.parametrize("form", ["bit", "index"])
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_batch_holds_true_targets_and_the_noise_level_of_its_layout(layout: str, form: str) -> None:
    config = ModelConfig(hidden_size=16, num_heads=2, text_hidden_size=4, latent_channels=3, rounds=3,
                         label_form=form, layout=layout)
    noise, samples, truth = NoiseConfig(), [], []
    for index, (thw, task) in enumerate([((1, 2, 2), "T2I"), ((3, 2, 3), "I2V"), ((2, 3, 2), "T2V")]):
        features = torch.rand(1, 3, *thw, generator=torch.Generator().manual_seed(index)) * 2 - 1
        bits = hbq.quantize_bits(features, 3)[0]
        labels = bits if form == "bit" else hbq.quantize_index(features, 3)[0]
        truth.append(hbq.to_token_major(labels)[int(task == "I2V"):].flatten(0, 2))
        draw = batch.Draw(index, "k", 0, thw, 1.0, task, -1, 2)
        packed = torch.frombuffer(bytearray(hbq.pack_bits(hbq.to_token_major(bits))), dtype=torch.uint8).numpy()
        samples.append(batch.Sample(draw, packed, torch.zeros(2, 4), valid=index != 2))
    weights = {0: 0.2, 1: 0.5, 2: 0.3}
    made = assemble(samples, weights, config=config, noise=noise, seed=SEED, length=128, device=torch.device("cpu"))
    assert torch.equal(made.targets_PD, torch.cat(truth))
    told = [signal_ratio(SEED, i, noise) for i in range(3)]
    torch.testing.assert_close(made.ratio_N, torch.tensor(told))
    if layout == "v1":
        assert torch.equal(made.input.level_N, made.ratio_N)
    else:
        tokens = [4, 18, 12]
        counts = made.input.level_N.double() * torch.tensor(tokens) * config.label_channels
        torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
        assert not torch.equal(made.input.level_N, made.ratio_N)
    # A sample whose bytes were bad keeps its place and counts nothing; the others keep their weights.
    labels = torch.tensor([4.0, 12.0, 0.0]) * config.label_channels
    assert torch.equal(made.labels_N, labels)
    torch.testing.assert_close(made.label_weight_N * labels, torch.tensor([0.2, 0.5, 0.0]))


# --- where training starts

def test_initial_weights_are_normal_biases_zero_and_norms_one():
    model = build_model(ModelConfig(hidden_size=64, num_layers=2, text_hidden_size=32), seed=3)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * p.numel())), name
            assert abs(p.mean().item()) < 5 * 0.02 / math.sqrt(p.numel()), name


def test_warm_up_reaches_the_peak_and_stays_there():
    rates = [learning_rate(step, 2e-4, ScheduleConfig(), 1000) for step in range(60)]
    assert rates[0] == pytest.approx(0.005 * 2e-4) and rates == sorted(rates)
    assert rates[49] < rates[50] == rates[59] == 2e-4

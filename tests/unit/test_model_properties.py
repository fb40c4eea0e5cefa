"""The plain torch model where the recordings do not reach: other head sizes, mixed packs, padding, every ratio key."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from grn_scale.config.schema import ModelConfig
from grn_scale.data.buckets import RATIO_KEYS
from grn_scale.model import GRN, Sample, build_model
from grn_scale.model.attention_kernels import SHORT_ON_CPU
from grn_scale.model.sequence import Grid, lay_out
from grn_scale.model.transformer import ModelInput, pack_samples
from tests.helpers.oracle import oracle_logits

BASE = ModelConfig(hidden_size=24, num_layers=2, num_heads=2, ffn_hidden_size=32, num_chunks=2, text_hidden_size=8,
                   latent_channels=3, rounds=2)
HEAD_SIZES = {"1 pair": 2, "2 pairs": 4, "3 pairs": 6, "4 pairs": 8, "5 pairs": 10, "10 pairs": 20, "64 pairs": 128}
"""Half of a head over three axes: with and without a remainder, and with nothing for time and height."""


def lively(config: ModelConfig) -> GRN:
    """Random weights large enough that every part of the network shows in the logits, norms and biases included."""
    model = build_model(config, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


def samples_of(config: ModelConfig, seed: int, count: int = 4) -> list[Sample]:
    """Samples of random shape, text length, level and ratio key, some with a given first frame."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        t, h, w = (int(n) for n in rng.integers(1, 5, size=3))
        labels = torch.randint(0, config.classes, (config.label_channels, t, h, w), generator=generator)
        text = torch.randn(int(rng.integers(1, 9)), config.text_hidden_size, generator=generator)
        samples.append(Sample(labels.to(torch.uint8), text, float(rng.random()), float(rng.choice(RATIO_KEYS)),
                              t > 1 and bool(rng.random() < 0.5)))
    return samples


def by_oracle(model: GRN, s: Sample) -> torch.Tensor:
    return oracle_logits(model.state_dict(), model.config, s.labels, s.text_states, s.signal_ratio, s.ratio_key,
                         s.first_frame)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("size", HEAD_SIZES.values(), ids=HEAD_SIZES)
def test_logits_follow_the_description_for_any_head_size(layout: str, size: int) -> None:
    config = dataclasses.replace(BASE, hidden_size=2 * size, layout=layout)
    model = lively(config)
    samples = samples_of(config, seed=size)
    with torch.no_grad():
        outputs = model.logits(samples)
    for sample, logits in zip(samples, outputs):
        torch.testing.assert_close(logits.double(), by_oracle(model, sample), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("change", [
    {"label_form": "index"}, {"rounds": 1}, {"rounds": 4, "label_form": "index"}, {"num_heads": 1}, {"num_heads": 4},
    {"num_chunks": 1}, {"num_layers": 6, "num_chunks": 3},
], ids=lambda change: ", ".join(f"{key} {value}" for key, value in change.items()))
def test_logits_follow_the_description_for_any_shape_of_model(layout: str, change: dict) -> None:
    config = dataclasses.replace(BASE, layout=layout, **change)
    model = lively(config)
    samples = samples_of(config, seed=sum(map(ord, repr(change))))
    with torch.no_grad():
        outputs = model.logits(samples)
    for sample, logits in zip(samples, outputs):
        torch.testing.assert_close(logits.double(), by_oracle(model, sample), atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio_key", RATIO_KEYS)
def test_logits_follow_the_description_at_every_ratio_key(ratio_key: float) -> None:
    model = lively(BASE)
    sample = dataclasses.replace(samples_of(BASE, seed=1, count=1)[0], ratio_key=ratio_key, first_frame=False,
                                 labels=torch.randint(0, 2, (6, 2, 5, 3), dtype=torch.uint8))
    with torch.no_grad():
        logits = model.logits([sample])[0]
    torch.testing.assert_close(logits.double(), by_oracle(model, sample), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_long_samples_follow_the_description_too(layout: str) -> None:
    # Above SHORT_ON_CPU keys attention takes another way.
    config = dataclasses.replace(BASE, layout=layout)
    model, short = lively(config), samples_of(config, seed=4, count=2)
    long = dataclasses.replace(short[0], first_frame=True,
                               labels=torch.randint(0, 2, (6, 3, SHORT_ON_CPU // 20, 10), dtype=torch.uint8))
    with torch.no_grad():
        outputs = model.logits([short[1], long])
    for sample, logits in zip([short[1], long], outputs):
        torch.testing.assert_close(logits.double(), by_oracle(model, sample), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("seed", range(5))
def test_a_sample_does_not_see_its_neighbours_in_the_pack_nor_the_padding(layout: str, seed: int) -> None:
    config = dataclasses.replace(BASE, layout=layout)
    model, samples = lively(config), samples_of(config, seed, count=6)
    samples.append(samples[2])  # equal lengths run as one batched call
    with torch.no_grad():
        together = model.logits(samples)
        for sample, logits in zip(samples, together):
            torch.testing.assert_close(model.logits([sample])[0], logits, atol=1e-5, rtol=0)
        x, counts = pack_samples(samples, config, torch.device("cpu"))
        for length in (x.layout.length + 1, x.layout.length + 77):
            layout_ = lay_out([grid_of(sample) for sample in samples], layout, config.head_size, length)
            padded = model.head.logits(model.hidden(dataclasses.replace(x, layout=layout_))).split(counts)
            for a, b in zip(padded, together):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def grid_of(sample: Sample) -> Grid:
    return Grid(tuple(sample.labels.shape[1:]), sample.ratio_key, len(sample.text_states), sample.first_frame)


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_every_row_of_a_sequence_has_one_owner_or_is_padding(layout: str) -> None:
    grids = [grid_of(sample) for sample in samples_of(BASE, seed=9, count=8)]
    packed = lay_out(grids, layout, BASE.head_size, 1024)
    rows = torch.cat((packed.visual_rows, packed.text_rows, packed.level_rows))
    used = sum(grid.visual_tokens + grid.text_tokens + 1 for grid in grids)
    assert sorted(rows.tolist()) == list(range(used))
    assert not packed.sin[used:].any() and (packed.cos[used:] == 1).all()
    queries = [row for group in packed.groups for row in range(group.start, group.stop)]
    assert sorted(queries) == list(range(used))


def test_text_sees_the_picture_under_layout_v2_only() -> None:
    for layout, changes in (("v1", False), ("v2", True)):
        config = dataclasses.replace(BASE, layout=layout)
        model, sample = lively(config), samples_of(config, seed=2, count=1)[0]
        states = [text_states(model, s) for s in (sample, dataclasses.replace(sample, labels=1 - sample.labels))]
        assert (not torch.equal(*states)) == changes


def text_states(model: GRN, sample: Sample) -> torch.Tensor:
    """States of the text tokens after the last block."""
    x, _ = pack_samples([sample], model.config, torch.device("cpu"))
    found = {}
    hook = model.block_chunks[-1].module[-1].register_forward_hook(
        lambda _, inputs, output: found.update(states=output[x.layout.text_rows]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return found["states"]


def test_a_pack_without_samples_gives_nothing_and_a_gradient_to_every_parameter() -> None:
    for layout in ("v1", "v2"):
        model = lively(dataclasses.replace(BASE, layout=layout))
        x = ModelInput(lay_out([], layout, BASE.head_size, 128), torch.zeros(0, 6, dtype=torch.uint8),
                       torch.zeros(0, 8), torch.zeros(0))
        scores = model(x)
        assert scores.shape == (0, 6)
        scores.sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_samples_that_do_not_fit_the_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        lay_out([Grid((1, 2, 2), 1.0, 3)], "v2", 8, 7)

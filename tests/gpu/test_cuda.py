"""The same numbers on a GPU as on a CPU: python -m pytest -m gpu

Where there is no GPU these tests are skipped; GRN_TEST_DEVICE=cpu runs what they do on a CPU, to check the tests.
"""

from __future__ import annotations

import os

import pytest
import torch

from grn_scale import hbq, keyed
from grn_scale.model import GRN, Sample
from grn_scale.sampling import generate
from grn_scale.tokenizer import load_tokenizer
from tests.helpers.golden import ALL_CASES, LOGITS, GoldenCase, case_id, golden_state
from tests.unit.test_sampler import CASES as TRACES
from tests.unit.test_sampler import SETTINGS, condition, lively, recorded_run
from tests.unit.test_sampler import SHAPE as SAMPLER_SHAPE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def device() -> torch.device:
    name = os.environ.get("GRN_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)


@pytest.mark.parametrize("recorded", ALL_CASES, ids=case_id)
def test_logits_equal_the_reference(device: torch.device, recorded: GoldenCase) -> None:
    model = GRN(recorded.config)
    model.load_state_dict(golden_state(recorded.model))
    model.to(device)
    samples = [Sample(recorded.mixed(i), recorded.of(i, "text"), float(recorded.of(i, "pt_used")), s["ratio_key"],
                      s["first_frame_condition"]) for i, s in enumerate(recorded.samples)]
    with torch.no_grad():
        for i, logits in enumerate(model.logits(samples)):
            torch.testing.assert_close(logits.cpu(), recorded.of(i, "logits"), atol=LOGITS, rtol=0)


@pytest.mark.parametrize("trace", TRACES)
def test_recorded_sampler_traces_are_reproduced(device: torch.device, trace: str) -> None:
    model, asked, settings, draws, labels = recorded_run(trace)
    assert torch.equal(generate(model.to(device), [asked], settings, draws=draws).labels, labels)


@pytest.mark.parametrize("precision,equal", [(torch.float32, 0.999), (torch.bfloat16, 0.9)])
def test_samples_are_those_of_the_cpu(device: torch.device, precision: torch.dtype, equal: float) -> None:
    # A label may differ where its random number lies within rounding of its probability, and then what follows.
    asked = [condition(n) for n in range(4)]
    expected = generate(lively(SAMPLER_SHAPE), asked, SETTINGS, seed=2).labels
    found = generate(lively(SAMPLER_SHAPE).to(device, precision), asked, SETTINGS, seed=2).labels
    assert (found == expected).float().mean() >= equal


def test_random_numbers_are_those_of_the_cpu(device: torch.device) -> None:
    counter = torch.arange(100_000)
    key = keyed.as_int64(keyed.key64(3, "sample label", 7, 1))
    assert torch.equal(keyed.hash32(key, counter.to(device)).cpu(), keyed.hash32(key, counter))


def test_the_tokenizer_gives_what_it_gives_on_a_cpu(device: torch.device) -> None:
    tokenizer = load_tokenizer("small")
    video = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        features = tokenizer.encode(video)
        frames = tokenizer.decode(features)
        tokenizer.to(device)
        there = tokenizer.encode(video.to(device))
        torch.testing.assert_close(there.cpu(), features, atol=1e-4, rtol=0)
        torch.testing.assert_close(tokenizer.decode(features.to(device)).cpu(), frames, atol=1e-3, rtol=0)
        bits, expected = hbq.quantize_bits(there, 4).cpu(), hbq.quantize_bits(features, 4)
    assert (bits != expected).float().mean() < 1e-3

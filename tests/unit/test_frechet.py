"""Statistics of features, the Frechet distance between them, the Inception Score, and what goes before a network."""

from __future__ import annotations

import math
import zipfile

import numpy as np
import pytest
import torch

from grn_scale.errors import ConfigError, UserError
from grn_scale.evaluation.frechet import Gaussian, Moments, frechet_distance
from grn_scale.evaluation.inception_score import InceptionScore
from grn_scale.evaluation.preprocessing import Preprocessing
from grn_scale.evaluation.statistics_file import read_statistics, write_statistics


def gaussian(mean, covariance) -> Gaussian:
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64), 100)


def random_gaussian(width: int, rank: int, seed: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(width, generator=generator, dtype=torch.float64), root @ root.T, rank)


def moments(features: torch.Tensor) -> Moments:
    found = Moments()
    found.add(features)
    return found


def test_distance_of_two_gaussians_with_diagonal_covariances_has_the_closed_form():
    one = gaussian([0.0, 1.0, -2.0], np.diag([1.0, 4.0, 9.0]))
    other = gaussian([1.0, 1.0, 2.0], np.diag([4.0, 4.0, 1.0]))
    wanted = 1 + 16 + sum((a - b) ** 2 for a, b in ((1, 2), (2, 2), (3, 1)))
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-13)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_distance_is_that_of_the_square_root_of_the_product_of_full_covariances():
    linalg = pytest.importorskip("scipy.linalg")
    one, other = random_gaussian(12, 30, 1), random_gaussian(12, 30, 2)
    root = linalg.sqrtm((one.covariance @ other.covariance).numpy()).real
    wanted = ((one.mean - other.mean) ** 2).sum() + (one.covariance + other.covariance).trace() - 2 * np.trace(root)
    assert frechet_distance(one, other) == pytest.approx(wanted.item(), rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(wanted.item(), rel=1e-9)


def test_distance_of_singular_covariances_is_finite_symmetric_and_zero_to_themselves():
    one, other = random_gaussian(40, 5, 1), random_gaussian(40, 7, 2)
    there, back = frechet_distance(one, other), frechet_distance(other, one)
    assert math.isfinite(there) and there == pytest.approx(back, rel=1e-10) and there > 0
    assert frechet_distance(one, one) < 1e-10 * one.covariance.trace()


def test_what_is_no_pair_of_gaussians_is_refused():
    with pytest.raises(UserError, match="3 features cannot be compared with 2"):
        frechet_distance(random_gaussian(3, 9, 0), random_gaussian(2, 9, 0))
    with pytest.raises(UserError, match="it is no covariance"):
        frechet_distance(gaussian([0.0, 0.0], [[1.0, 3.0], [3.0, 1.0]]), random_gaussian(2, 9, 0))


def test_merged_statistics_are_those_of_the_whole_also_far_from_zero():
    features = torch.randn(500, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    whole, parts = moments(features), [moments(part) for part in features.split([1, 0, 120, 379])]
    merged = Moments()
    for part in (parts[2], parts[1], parts[0], parts[3]):
        merged.merge(part)
    batches = Moments()
    for part in features.split(33):
        batches.add(part)
    wanted = torch.cov(features.T)
    for found in (whole, merged, batches):
        assert found.count == 500
        torch.testing.assert_close(found.gaussian().mean, features.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(found.gaussian().covariance, wanted, rtol=1e-8, atol=1e-8)


def test_statistics_refuse_what_cannot_be_counted():
    with pytest.raises(UserError, match="hold NaN or infinity"):
        moments(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(UserError, match="at least 2 samples"):
        moments(torch.ones(1, 3)).gaussian()
    with pytest.raises(UserError, match="2 features first and 3 later"):
        moments(torch.ones(2, 2)).add(torch.ones(2, 3))


def test_inception_score_of_known_predictions():
    sure = InceptionScore(12, 1)
    sure.add(torch.eye(4).repeat(3, 1))
    assert sure.result()["mean"] == pytest.approx(4)  # each class, each time without doubt
    alike = InceptionScore(6, 2)
    alike.add(torch.full((5, 4), 0.25))
    alike.add(torch.full((1, 4), 0.25))
    assert alike.result() == {"mean": pytest.approx(1), "standard_deviation": pytest.approx(0), "splits": 2,
                              "samples": 6, "classes": 4}
    # p = (1-e, e) and (e, 1-e): KL to the even mean is log 2 - H(e)
    mixed = InceptionScore(2, 1)
    mixed.add(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    assert mixed.result()["mean"] == pytest.approx(2 * 0.9**0.9 * 0.1**0.1, rel=1e-6)


def inception_score(p: torch.Tensor, splits: int, batch: int) -> InceptionScore:
    score = InceptionScore(len(p), splits)
    for part in p.split(batch):
        score.add(part)
    return score


def test_inception_score_of_batches_is_that_of_each_split_of_nearly_equal_size():
    p = torch.rand(50, 6, generator=torch.Generator().manual_seed(0)).softmax(1)
    score = inception_score(p, 3, 7)
    assert sorted(score.split.bincount().tolist()) == [16, 17, 17]
    wanted = []
    for i in range(3):
        part = p[score.split == i].double()
        wanted.append((part * (part.log() - part.mean(0).log())).sum(1).mean().exp().item())
    assert score.result()["mean"] == pytest.approx(np.mean(wanted))
    assert score.result()["standard_deviation"] == pytest.approx(np.std(wanted))
    assert inception_score(p, 3, 50).result()["mean"] == pytest.approx(np.mean(wanted), rel=1e-12)


def test_inception_score_of_samples_sorted_by_class_is_about_that_of_shuffled_ones():
    classes, each = 10, 100
    p = (5 * torch.eye(classes).repeat_interleave(each, 0)).softmax(1)
    mixed = p[torch.randperm(len(p), generator=torch.Generator().manual_seed(7))]
    whole = inception_score(p, 1, 64).result()["mean"]
    found = [inception_score(rows, 10, 64).result() for rows in (p, mixed)]
    assert found[0]["mean"] == pytest.approx(found[1]["mean"], rel=0.03) == pytest.approx(whole, rel=0.1)
    assert found[0]["standard_deviation"] < 0.1 * whole


def test_inception_score_is_not_given_before_all_samples_are_there():
    score = InceptionScore(3, 1)
    score.add(torch.full((2, 4), 0.25))
    with pytest.raises(ValueError, match="2 samples were added of 3"):
        score.result()


def test_inception_score_refuses_logits_and_too_few_samples():
    with pytest.raises(UserError, match="--score-form logits"):
        InceptionScore(2, 1).add(torch.tensor([[3.0, -1.0], [0.5, 0.5]]))
    with pytest.raises(UserError, match="give --splits 3 or fewer"):
        InceptionScore(3, 10)


def test_statistics_are_read_as_they_were_written_and_from_files_of_others(tmp_path):
    one = random_gaussian(5, 9, 0)
    write_statistics(tmp_path / "ours.npz", one, {"network": "n"})
    found, settings = read_statistics(tmp_path / "ours.npz")
    assert torch.equal(found.mean, one.mean) and found.count == 9 and settings == {"network": "n"}
    torch.testing.assert_close(found.covariance, one.covariance, rtol=1e-15, atol=1e-15)
    np.savez(tmp_path / "theirs.npz", mean=one.mean.float().numpy(), cov=one.covariance.float().numpy())
    found, settings = read_statistics(tmp_path / "theirs.npz")
    assert settings is None and found.count is None and frechet_distance(found, one) < 1e-4


MU, SIGMA = np.zeros(3), np.eye(3)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"mu": MU}, "holds mu, but statistics are mu and sigma"),
    ({"mu": MU, "cov": SIGMA, "arr_0": MU}, "holds arr_0, cov, mu, but statistics"),
    ({"mu": MU, "sigma": np.eye(4)}, r"\[3\] and sigma \[4, 4\]"),
    ({"mu": MU[None], "sigma": SIGMA}, "must be"),
    ({"mu": MU, "sigma": SIGMA + np.diag([1.0, 1.0], 1)}, "not symmetric"),
    ({"mu": MU, "sigma": -SIGMA}, "negative variance"),
    ({"mu": MU, "sigma": SIGMA * np.nan}, "NaN or infinity"),
    ({"mu": MU.astype(complex), "sigma": SIGMA}, "must hold real numbers"),
    ({"mu": np.array([{}], dtype=object), "sigma": SIGMA}, "Object arrays cannot be loaded"),
    ({"mu": MU, "sigma": SIGMA, "settings": np.array("{")}, "settings are no JSON"),
])
def test_statistics_that_are_none_are_refused_with_the_reason(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "bad.npz")


def test_files_that_are_no_archive_are_refused(tmp_path):
    for name, data in (("text.npz", b"no archive"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "whole.npz", mu=MU, sigma=SIGMA)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-40])
    np.savez_compressed(tmp_path / "damaged.npz", mu=np.arange(300.0), sigma=SIGMA)
    data = bytearray((tmp_path / "damaged.npz").read_bytes())
    data[100:140] = bytes(40)
    (tmp_path / "damaged.npz").write_bytes(data)
    for name in ("text.npz", "empty.npz", "cut.npz", "damaged.npz", "missing.npz"):
        with pytest.raises(UserError, match="cannot read"):
            read_statistics(tmp_path / name)


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("grn_scale.evaluation.statistics_file.LARGEST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(100_000))
    with pytest.raises(UserError, match="unpacks to more"):
        read_statistics(tmp_path / "bomb.npz")


def test_what_lies_beside_the_statistics_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("grn_scale.evaluation.statistics_file.LARGEST_BYTES", 1000)
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros(10_000, np.uint8), objects=np.array([{}], dtype=object), mu=MU,
             sigma=SIGMA)
    found, settings = read_statistics(tmp_path / "batch.npz")
    assert torch.equal(found.covariance, torch.eye(3, dtype=torch.float64)) and settings is None


def test_samples_wait_as_copies_that_do_not_keep_their_file_in_memory():
    frames = np.zeros((6, 2, 2, 3), np.uint8)
    for prepare in (Preprocessing(frame_every=2), Preprocessing(), Preprocessing(input="clips", clip_frames=3)):
        assert not np.shares_memory(prepare.pick(frames), frames)
    assert Preprocessing(input="clips", clip_frames=3).most_frames == 3 and Preprocessing().most_frames is None


def test_preprocessing_scales_shifts_and_stretches_as_it_says():
    frames = np.zeros((3, 8, 16, 3), np.uint8)
    frames[..., 0] = 255
    device = torch.device("cpu")
    assert Preprocessing()(frames, device)[:, 0].eq(255).all()
    signed = Preprocessing(value_range="-1..1")(frames, device)
    assert signed[:, 0].eq(1).all() and signed[:, 1:].eq(-1).all()
    tuned = Preprocessing(value_range="0..1", mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 2.0), resize=(4, 4))(frames, device)
    assert tuned.shape == (3, 3, 4, 4)
    torch.testing.assert_close(tuned[0, :, 0, 0], torch.tensor([1.0, -0.5, 0.0]))
    clips = Preprocessing(input="clips", clip_frames=3)
    x = clips(clips.pick(np.arange(5 * 2 * 2 * 3, dtype=np.uint8).reshape(5, 2, 2, 3)), device)
    assert x.shape == (1, 3, 3, 2, 2) and x[0, 1, 2, 0, 0] == 25  # green of frame 2
    assert clips.pick(frames[:2]) is None and len(Preprocessing(frame_every=2).pick(frames)) == 2


def test_options_of_preprocessing_are_checked():
    from grn_scale.command_line import CommandParser
    from grn_scale.evaluation.preprocessing import add_options, of_options

    def parsed(*words):
        parser = CommandParser("x", "", "", configured=False)
        add_options(parser)
        return of_options(parser.parse_options(list(words)), Preprocessing(mean=(1.0, 1.0, 1.0), resize=(9, 9)))

    assert parsed() == Preprocessing(mean=(1.0, 1.0, 1.0), resize=(9, 9))
    assert parsed("--mean", "none", "--resize", "none", "--value-range=-1..1", "--input", "clips") == Preprocessing(
        value_range="-1..1", input="clips")
    for words in (("--mean", "1,2"), ("--std", "0,1,1"), ("--resize", "12"), ("--frame-every", "0"),
                  ("--mean", "a,b,c"), ("--resize", "0x4")):
        with pytest.raises(ConfigError, match=words[0]):
            parsed(*words)

"""Scaling laws: published constants, recovery from noisy runs, outliers, and runs that determine nothing."""

from __future__ import annotations

import numpy as np
import pytest

from grn_scale.errors import UserError
from grn_scale.planning.scaling_law import COEFFICIENTS, Law, fit

HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""Hoffmann et al. 2022 (arXiv:2203.15556), appendix D.3."""
BESIROGLU = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al. 2024 (arXiv:2404.10102): the same runs, fitted until convergence."""
CHINCHILLA = 5.76e23
"""FLOPs of Chinchilla, which has 70e9 parameters and saw 1.4e12 tokens (Hoffmann et al. 2022)."""


def grid(sizes: int = 5, lengths: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return (np.repeat(np.geomspace(5e7, 5e9, sizes), lengths), np.tile(np.geomspace(1e9, 1e11, lengths), sizes))


def noisy(law: Law, params: np.ndarray, tokens: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    return law.loss(params, tokens) * np.exp(deviation * np.random.default_rng(seed).standard_normal(len(params)))


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU])
@pytest.mark.parametrize("factor", [6.0, 8.5])
def test_the_optimum_is_the_lowest_loss_of_a_budget(law, factor):
    params, tokens = law.optimum(1e22, factor)
    assert factor * params * tokens == pytest.approx(1e22)
    others = params * np.geomspace(0.5, 2, 101)
    assert np.argmin(law.loss(others, 1e22 / factor / others)) == 50


def test_published_constants_give_the_published_sizes():
    params, tokens = BESIROGLU.optimum(CHINCHILLA)
    assert params == pytest.approx(70e9, rel=0.1) and tokens / params == pytest.approx(20, rel=0.15)
    # the rounded constants of the first paper give a size far below the one it trained
    assert HOFFMANN.optimum(CHINCHILLA)[0] < 0.5 * params
    assert HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.94, abs=0.005)


def test_runs_without_noise_give_the_law_back():
    params, tokens = grid()
    law = fit(params, tokens, HOFFMANN.loss(params, tokens), samples=0, seed=0).law
    for name in COEFFICIENTS:
        assert getattr(law, name) == pytest.approx(getattr(HOFFMANN, name), rel=0.005)


def test_intervals_of_noisy_runs_hold_the_law_about_as_often_as_they_say():
    params, tokens = grid(4, 4)
    figures = [*(lambda law, name=name: getattr(law, name) for name in COEFFICIENTS), lambda law: law.optimum(1e23)[0]]
    held = []
    for seed in range(8):
        fitted = fit(params, tokens, noisy(HOFFMANN, params, tokens, 0.005, seed), samples=30, seed=seed)
        for figure in figures:
            low, high = fitted.interval([figure(law) for law in fitted.samples])
            held.append(low <= figure(HOFFMANN) <= high)
    assert np.mean(held) > 0.8


def test_runs_that_went_wrong_hardly_move_the_law():
    params, tokens = grid(6, 6)
    loss = noisy(HOFFMANN, params, tokens, 0.002)
    clean = fit(params, tokens, loss, samples=0, seed=0)
    loss[[4, 20]] *= 1.5
    spoilt = fit(params, tokens, loss, samples=0, seed=0)
    assert spoilt.law.optimum(1e23)[0] == pytest.approx(clean.law.optimum(1e23)[0], rel=0.2)
    assert spoilt.law.E == pytest.approx(clean.law.E, rel=0.03)
    assert set(np.argsort(spoilt.residuals)[-2:]) == {4, 20}


def test_intervals_depend_on_the_seed_alone():
    params, tokens = grid(4, 4)
    loss = noisy(HOFFMANN, params, tokens, 0.005)
    first, again, other = (fit(params, tokens, loss, samples=3, seed=seed).samples for seed in (0, 0, 1))
    assert first == again != other


def without_law(params, tokens, loss):
    return lambda: fit(np.asarray(params, float), np.asarray(tokens, float), np.asarray(loss, float), samples=0, seed=0)


PARAMS, TOKENS = grid(3, 4)
LOSS = HOFFMANN.loss(PARAMS, TOKENS)


@pytest.mark.parametrize("call, words", [
    (without_law(PARAMS[:7], TOKENS[:7], LOSS[:7]), "7 runs, but five coefficients need 8"),
    (without_law(np.full(12, 1e9), TOKENS, LOSS), "1 different sizes"),
    (without_law(PARAMS, np.repeat([1e9, 2e9], 6), LOSS), "2 different numbers of tokens"),
    (without_law(np.geomspace(1e8, 1e10, 12), 20 * np.geomspace(1e8, 1e10, 12), LOSS), "cannot be told apart"),
    (without_law(PARAMS, TOKENS, np.full(12, 3.0)), "the same loss"),
    (without_law(PARAMS, TOKENS, LOSS * (PARAMS / 1e8) ** 0.5), "the exponent of params ends at its bound"),
])
def test_runs_that_determine_no_law_are_refused_with_what_is_missing(call, words):
    with pytest.raises(UserError, match=words):
        call()

"""Loss as a function of parameters and tokens, fitted to finished runs, and the size to train for a budget.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", section
3.3, approach 3): fitted by the Huber loss of the residuals of log L, with L-BFGS from many starting points. Besiroglu
et al. 2024 ("Chinchilla Scaling: A replication attempt", arXiv:2404.10102) found that the original fit had stopped
early because its objective was averaged over runs, and so too small for the optimizer's tolerance. Here the objective
is a sum, in units of the Huber threshold, over centred logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from grn_scale.errors import UserError
from grn_scale.keyed import key64, uniforms

HUBER = 1e-3
"""Residuals of log L below it count by their square, those above by their size (Hoffmann et al. 2022, section 3.3)."""
LEAST_RUNS = 8
"""Five coefficients, and some runs that check them."""
LEAST_DIFFERENT = 3
"""Sizes, and numbers of tokens: a power law with an offset has three coefficients."""
LEAST_SPREAD = 0.05
"""Standard deviation of log D about its regression on log N, below which the two cannot be told apart."""
START_EXPONENTS = (0.1, 0.2, 0.35, 0.6, 1.0)
STARTS = 6
"""Of the pairs of exponents, the best ones, from which L-BFGS goes on."""
EXPONENT_BOUNDS = (0.02, 3.0)
"""A law at these bounds is no power law: its term hardly changes, or nothing but the smallest runs have it."""
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Law:
    """Coefficients of L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """L(N, D)."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def optimum(self, flops: float, factor: float = 6.0) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss where factor * N * D = flops.

        N = G (C/k)^(beta/(alpha+beta)), D = (C/k)^(alpha/(alpha+beta)) / G, G = (alpha A / (beta B))^(1/(alpha+beta))
        (Hoffmann et al. 2022, eq. 4, there with k = 6).
        """
        both = self.alpha + self.beta
        ratio = np.log(self.alpha) + np.log(self.A) - np.log(self.beta) - np.log(self.B)
        params = float(np.exp((ratio + self.beta * np.log(flops / factor)) / both))
        return params, flops / factor / params


@dataclass(frozen=True)
class Fit:
    """The law of all runs, and those of samples of runs drawn with replacement."""

    law: Law
    samples: tuple[Law, ...]
    residuals: np.ndarray
    """log of measured over fitted loss, of each run."""

    def interval(self, values: list[float]) -> tuple[float, float]:
        """Bounds that 95 % of what the samples give lie within."""
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)


def fit(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, *, samples: int, seed: int) -> Fit:
    """The law of finished runs, one value a run, with `samples` bootstrap samples drawn by (seed, sample, run).

    Samples that have fewer than LEAST_DIFFERENT sizes or numbers of tokens determine nothing and are drawn again.
    Raises UserError where the runs do not determine the law.
    """
    _check(params, tokens, loss)
    x, y, target = np.log(params), np.log(tokens), np.log(loss)
    starts = sorted(_starts(params, tokens, loss), key=lambda start: _objective(start, x - x.mean(), y - y.mean(),
                                                                                 target)[0])
    law, values = _minimize(x, y, target, starts[:STARTS])
    for name, exponent in (("params", law.alpha), ("tokens", law.beta)):
        if not EXPONENT_BOUNDS[0] < exponent < EXPONENT_BOUNDS[1]:
            raise UserError(f"the exponent of {name} ends at its bound, {exponent:g}: over these runs the loss does "
                            f"not fall as a power of {name}; look for runs that went wrong, or add runs farther apart")
    laws, drawn = [], 0
    while len(laws) < samples:
        chosen = (uniforms(key64("scaling law", seed, drawn), np.arange(len(loss))) * len(loss)).astype(np.int64)
        drawn += 1
        if _determined(x[chosen], y[chosen]):
            laws.append(_minimize(x[chosen], y[chosen], target[chosen], [values], x.mean(), y.mean())[0])
        elif drawn > 20 * (samples + 10):
            raise UserError("most samples of these runs have too few sizes or numbers of tokens to fit: add runs, or "
                            "take --bootstrap 0")
    return Fit(law, tuple(laws), target - np.log(law.loss(params, tokens)))


def _check(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> None:
    if len(loss) < LEAST_RUNS:
        raise UserError(f"{len(loss)} runs, but five coefficients need {LEAST_RUNS} at least: add runs")
    for name, values, what in (("sizes", params, "parameters"), ("numbers of tokens", tokens, "tokens")):
        different = _different(np.log(values))
        if different < LEAST_DIFFERENT:
            raise UserError(f"the runs have {different} different {name}, but the effect of {what} is fitted from "
                            f"{LEAST_DIFFERENT} at least: add runs with other {name}")
    if not _determined(np.log(params), np.log(tokens)):
        raise UserError("tokens follow from parameters in these runs (such as 20 tokens a parameter in all of them), "
                        "so their effects cannot be told apart: add runs of the same size with fewer or more tokens")
    if not np.ptp(loss) > 0:
        raise UserError("all runs have the same loss: there is nothing to fit")


def _different(logs: np.ndarray) -> int:
    """Number of values, those within a thousandth of each other counted once."""
    return 1 + int(np.count_nonzero(np.diff(np.sort(logs)) > 1e-3))


def _determined(x: np.ndarray, y: np.ndarray) -> bool:
    if min(_different(x), _different(y)) < LEAST_DIFFERENT:
        return False
    slope = np.cov(x, y)[0, 1] / np.var(x, ddof=1)
    return float(np.std(y - slope * x)) > LEAST_SPREAD


def _starts(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> list[np.ndarray]:
    """Starting points: for each pair of exponents the non-negative E, A and B of least squared relative residuals,
    which are linear then; this takes the place of a grid over all five."""
    from scipy.optimize import nnls

    x, y = np.log(params), np.log(tokens)
    x, y = x - x.mean(), y - y.mean()
    starts = []
    for alpha in START_EXPONENTS:
        for beta in START_EXPONENTS:
            columns = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], axis=1)
            scales, _ = nnls(columns / loss[:, None], np.ones_like(loss))
            floor = 1e-3 * loss.min()  # a logarithm has to start somewhere
            starts.append(np.array([*np.log(np.maximum(scales, floor)), alpha, beta]))
    return starts


def _minimize(x: np.ndarray, y: np.ndarray, target: np.ndarray, starts: list[np.ndarray],
              x_mean: float | None = None, y_mean: float | None = None) -> tuple[Law, np.ndarray]:
    """The best law that L-BFGS finds from the starting points, and its values (log E, log A', log B', alpha, beta),
    with A' and B' at the centre of log N and log D."""
    from scipy.optimize import minimize

    x_mean = x.mean() if x_mean is None else x_mean
    y_mean = y.mean() if y_mean is None else y_mean
    x, y = x - x_mean, y - y_mean
    lowest = target.min() - 12
    bounds = [(lowest, target.max()), (lowest, None), (lowest, None), EXPONENT_BOUNDS, EXPONENT_BOUNDS]
    found = [minimize(_objective, start, (x, y, target), jac=True, method="L-BFGS-B", bounds=bounds,
                      options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-7}) for start in starts]
    best = min(found, key=lambda result: result.fun).x
    e, a, b, alpha, beta = best
    return Law(float(np.exp(e)), float(np.exp(a + alpha * x_mean)), float(np.exp(b + beta * y_mean)), float(alpha),
               float(beta)), best


def _objective(values: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of Huber losses of the residuals of log L over HUBER, and its gradient."""
    e, a, b, alpha, beta = values
    terms = np.stack([np.full_like(x, e), a - alpha * x, b - beta * y])
    top = terms.max(axis=0)
    shares = np.exp(terms - top)
    total = shares.sum(axis=0)
    shares /= total
    residual = (top + np.log(total) - target) / HUBER
    size = np.abs(residual)
    loss = np.where(size <= 1, residual**2 / 2, size - 0.5).sum()
    slope = np.clip(residual, -1, 1) / HUBER
    by_term = shares @ slope
    return float(loss), np.array([*by_term, -(shares[1] * x) @ slope, -(shares[2] * y) @ slope])

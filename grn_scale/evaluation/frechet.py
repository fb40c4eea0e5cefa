"""Mean and covariance of features, gathered batch by batch, and the Frechet distance between two of them.

Legend: n samples, d features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grn_scale.errors import UserError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """What the Frechet distance knows of a set of samples."""

    mean: torch.Tensor
    """fp64 [d]"""
    covariance: torch.Tensor
    """fp64 [d, d], divided by n - 1."""
    count: int | None
    """Samples it was computed from, where known."""

    @property
    def width(self) -> int:
        return len(self.mean)


class Moments:
    """Running mean and scatter in fp64; the memory is that of d x d numbers.

    Batches are merged by their own means (Chan, Golub and LeVeque, 1983): no large sums are subtracted, so features
    with a large mean lose no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self.scatter = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: torch.Tensor) -> None:
        """Take in features [n, d] of any floating-point type. UserError where one is not finite or d has changed."""
        batch, values = Moments(), features.to("cpu", torch.float64)
        if not len(values):
            return
        if not torch.isfinite(values).all():
            raise UserError("the network's features hold NaN or infinity: its weights are damaged, or its input is not "
                            "in the range it was trained with (--value-range, --mean, --std)")
        batch.count, batch.mean = len(values), values.mean(0)
        centred = values - batch.mean
        batch.scatter = centred.T @ centred
        self.merge(batch)

    def merge(self, other: Moments) -> None:
        """Take in what another object has gathered. UserError where the widths differ."""
        if not other.count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        if len(self.mean) != len(other.mean):
            raise UserError(f"the network gave {len(self.mean)} features first and {len(other.mean)} later: it must "
                            "give one number of them for all samples")
        total, apart = self.count + other.count, other.mean - self.mean
        self.scatter += other.scatter + torch.outer(apart, apart) * (self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and covariance so far. UserError where there are fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a covariance takes at least 2 samples, but there is {self.count or 'none'}")
        return Gaussian(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): the squared Frechet (2-Wasserstein) distance, FID and FVD.

    The last trace is the sum of the singular values of C1^(1/2) C2^(1/2). With roots of the symmetric factors nothing
    becomes complex, and singular covariances (fewer samples than features) need no constant on the diagonal.
    UserError where the widths differ or a covariance has negative eigenvalues beyond rounding.
    """
    if one.width != other.width:
        raise UserError(f"{one.width} features cannot be compared with {other.width}: use the network that the "
                        "statistics were made with")
    cross = torch.linalg.svdvals(_root(one.covariance) @ _root(other.covariance)).sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding may leave a little below 0 for equal sets


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    # Statistics kept in fp32 have negative eigenvalues of about 1e-7 of the largest.
    if values[0] < -1e-4 * values[-1].abs():
        raise UserError(f"the covariance has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}: it is no "
                        "covariance (none is negative); the statistics are damaged")
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

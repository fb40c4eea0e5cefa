"""Muon: momentum whose update of every weight matrix is made orthogonal (Jordan et al., 2024, "Muon: an optimizer for
hidden layers"). All directions of a matrix then move alike, where Adam follows the few that dominate the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as published: fast rather than exact, singular values end up between 0.7 and 1.2."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Updates convolution weights, each read as a matrix [output channels, all the rest]; momentum is Nesterov's.

    The update has about unit spectral norm, times sqrt(outputs / inputs) where outputs are more, times `lr`.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient. Those of one shape are made orthogonal in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                updates = orthogonal(torch.stack([self._momentum(p, group["momentum"]).flatten(1) for p in parameters]))
                outputs, inputs = updates.shape[1:]
                rate = group["lr"] * max(1.0, outputs / inputs) ** 0.5
                for parameter, update in zip(parameters, updates):
                    parameter.sub_(update.view(parameter.shape), alpha=rate)

    def _momentum(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns] with their singular values brought near 1 (zero matrices stay zero)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x

"""The values of every step, under the names of the recorded reference traces (tests/golden)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

PER_SAMPLE = ("initial_labels", "final_latent", "decision_entropy", "dynamic_steps")
"""Names with one value for each sample; every other one has a value for each step."""


def batched(values: Sequence[torch.Tensor], dim: int) -> torch.Tensor | list[torch.Tensor]:
    """One tensor with a new axis `dim` over the values, or a list of them where their shapes differ."""
    if all(value.shape == values[0].shape for value in values):
        return torch.stack(list(values), dim=dim)
    return [value.clone() for value in values]


class Trace:
    """Collects what the samples of one call go through, each for itself: they may end at different steps."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, sample: int, value: torch.Tensor | float) -> None:
        """Append a value (a number becomes float64) to those of `name` for this sample of the call."""
        value = value.cpu() if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
        self._values[name][sample].append(value)

    def result(self) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        """Name -> [S, B, ...], or a list of B tensors [S, ...] where samples differ in shape or in steps.

        A single sample's plain numbers are [S], and what a sample has once is [B, ...].
        """
        result = {}
        for name, by_sample in self._values.items():
            samples = [by_sample[n] for n in sorted(by_sample)]
            if name in PER_SAMPLE:
                result[name] = batched([values[0] for values in samples], 0)
            elif len(samples) == 1 and samples[0][0].dim() == 0:
                result[name] = torch.stack(samples[0])
            else:
                result[name] = batched([torch.stack(values) for values in samples], 1)
        return result


class Draws:
    """Given values that stand in for all random numbers, in the form that `Trace.result` gives them.

    A whole trace will do: names beside the three are not read. ValueError where one of the three is missing.
    """

    NAMES = ("initial_labels", "sampled_labels", "use_predict_mask")

    def __init__(self, values: Mapping[str, torch.Tensor | Sequence[torch.Tensor]]) -> None:
        missing = [name for name in self.NAMES if name not in values]
        if missing:
            raise ValueError(f"draws replace all random numbers, but hold no {', '.join(missing)}")
        self._values = values

    def initial(self, sample: int) -> torch.Tensor:
        """uint8 [D, t, h, w] of a sample."""
        return self._values["initial_labels"][sample]

    def step(self, name: str, sample: int, step: int) -> torch.Tensor:
        """uint8 [D, t, h, w] of a sample at a step."""
        value = self._values[name]
        steps = len(value) if isinstance(value, torch.Tensor) else len(value[sample])
        if step >= steps:
            raise ValueError(f"draws hold {steps} steps of {name}, but sample {sample} takes more")
        return value[step, sample] if isinstance(value, torch.Tensor) else value[sample][step]

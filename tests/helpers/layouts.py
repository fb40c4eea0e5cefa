"""Every way to lay a training job out over up to eight processes, and few of them that meet every ZeRO stage."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from grn_scale.config.check import check_layout
from grn_scale.config.schema import ModelConfig
from grn_scale.errors import ConfigError
from tests.helpers.parity import parity_config

LARGEST_WORLD = 8
AXES = {
    "data": (1, 2),
    "tensor": (1, 2),
    "sequence": (True, False),
    "pipeline": (1, 2),
    "virtual_pipeline": (1, 2),
    "context": (1, 2),
    "stage": (0, 1, 2, 3),
    "recompute": ("none", "selective", "full"),
    "numbers": (("fp32", "sgd"), ("fp32", "adamw"), ("bf16", "adamw")),
}


@dataclass(frozen=True)
class Layout:
    data: int = 1
    tensor: int = 1
    sequence: bool = True
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    stage: int = 1
    recompute: str = "none"
    numbers: tuple[str, str] = ("fp32", "adamw")
    """Precision and optimizer."""

    @property
    def precision(self) -> str:
        return self.numbers[0]

    @property
    def optimizer(self) -> str:
        return self.numbers[1]

    @property
    def world(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    def __str__(self) -> str:
        parts = [f"DP{self.data}", f"TP{self.tensor}{'+SP' if self.sequence else ''}" if self.tensor > 1 else "",
                 f"PP{self.pipeline}" if self.pipeline > 1 else "",
                 f"VPP{self.virtual_pipeline}" if self.virtual_pipeline > 1 else "",
                 f"CP{self.context}" if self.context > 1 else "", f"ZeRO{self.stage}",
                 self.recompute if self.recompute != "none" else "", *self.numbers]
        return "-".join(filter(None, parts))

    def config(self, **settings):
        """Its parity configuration; settings as of `parity_config`."""
        fields = dataclasses.asdict(self)
        del fields["data"], fields["numbers"]
        fields |= {"precision": self.precision, "optimizer": self.optimizer}
        return parity_config(**{**fields, **settings})


def layouts(model: ModelConfig) -> list[Layout]:
    """All that the rules allow for the model, each once."""
    found = []
    for values in itertools.product(*AXES.values()):
        layout = Layout(*values)
        if layout.tensor == 1 and not layout.sequence:
            continue  # the same as with it
        try:
            check_layout(layout.config(model=model), layout.world)
        except ConfigError:
            continue
        if layout.world <= LARGEST_WORLD:
            found.append(layout)
    return found


def few(candidates: Sequence[Layout]) -> list[Layout]:
    """Few of the candidates in which every feature meets every ZeRO stage that it meets in any of them.

    Greedy: always the one with the most pairs that are new; of equal ones that with the fewest processes.
    """

    def pairs(layout: Layout) -> set:
        return {(layout.stage, axis, getattr(layout, axis)) for axis in AXES}

    open_pairs = set().union(*map(pairs, candidates))
    chosen: list[Layout] = []
    while open_pairs:
        best = max(candidates, key=lambda layout: (len(pairs(layout) & open_pairs), -layout.world))
        chosen.append(best)
        open_pairs -= pairs(best)
    return sorted(chosen, key=lambda layout: (layout.world, str(layout)))

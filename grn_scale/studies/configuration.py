"""What the cells of a study run, in words: what all series start from, and the layout that each comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.studies.study import PACKS, Cell, Study, series_of

WORDS = {
    "parallel.tensor": "tensor parallelism (TP)",
    "parallel.sequence": "sequence parallelism (SP) inside TP; no effect at TP 1",
    "parallel.pipeline": "pipeline parallelism (PP)",
    "parallel.virtual_pipeline": "model chunks of a pipeline rank (VPP)",
    "parallel.context": "context parallelism (CP)",
    "parallel.recompute": "activation recomputation",
    "parallel.recompute_modules": "what is recomputed of each layer where parallel.recompute is selective",
    "zero.stage": "DeepSpeed ZeRO stage",
    "zero.offload_optimizer": "optimizer states in host memory",
    "train.precision": "of weights and activations; bf16 keeps fp32 masters, moments and gradient accumulation",
    "optimizer.name": "optimizer",
    "kernels.attention": "attention on GPUs in bf16 (auto: cudnn for segments of 1,024 keys or more, varlen for the "
                         "others); on CPUs and in fp32 it is sdpa",
    "kernels.adamw": "implementation of AdamW",
    "kernels.norm": "implementation of the layers' RMS norms",
    "kernels.cross_entropy": "cross entropy of labels of more than two classes",
    "kernels.compile": "torch.compile of element-wise chains (auto: on GPUs only)",
    "text.states": "what the data holds of captions beside token ids (none: the text encoder runs in training; auto: "
                   "as the data was tokenized)",
    "data.token_budget": "tokens of a pack, padding counted",
    "data.packs_per_step": "packs of a step, over all processes (the global batch)",
}
"""Dotted key -> what it is, of all that decides how fast a step is beside the model."""
DEGREES = ("TP, PP, CP and DP are the degrees of tensor, pipeline, context and data parallelism; DP is what the "
           "number of processes leaves over. SP is sequence parallelism inside TP, VPP the number of model chunks of a "
           "pipeline rank, ZeRO-n DeepSpeed's ZeRO stage.")


@dataclass(frozen=True)
class Settings:
    """The cells of a study, each with its configuration."""

    study: Study
    cells: Sequence[tuple[Cell, Config]]

    @classmethod
    def read(cls, study: Study) -> Settings:
        """UserError where a cell's configuration is not what was generated."""
        paths = {cell.config_sha256: study.config_of(cell) for cell in study.cells}
        configs = {digest: load_config(path) for digest, path in paths.items()}
        return cls(study, [(cell, configs[cell.config_sha256]) for cell in study.cells])

    def base(self, key: str) -> Any:
        """Value of a dotted key or section that all series start from; None where every series sets another."""
        start = [value_of(config, key) for cell, config in self.cells if not _sets(cell, key)]
        values = self._values(key)
        return start[0] if start else values[0] if len(values) == 1 else None

    def told(self, key: str, form: Callable[[Any], str] | None = None) -> str:
        """The value that all series start from, and the others where it varies between cells."""
        form, values, base = form or _plain, self._values(key), self.base(key)
        if len(values) == 1:
            return form(values[0])
        grows = key == PACKS and self.study.file.mode == "weak"
        what = "varies with the number of processes" if grows else "varies between series"
        start = "" if base is None else f"{form(base)}; "
        return f"{start}{what}: {', '.join(map(form, values))}"

    def table(self) -> list[tuple[str, str, str]]:
        """Key, value and what it is: of all that decides how a step runs, then of what else the study sets."""
        file = self.study.file
        others = [(key, _plain(value), "set by the study") for key, value in file.set.items() if key not in WORDS]
        return [("config", file.config or "none: the defaults", "run file that all cells start from"),
                ("model", self.told("model", shape), "its shape"),
                *((key, self.told(key), words) for key, words in WORDS.items() if self._matters(key)), *others]

    def layouts(self) -> list[tuple[str, str, str]]:
        """Name of each series, what it sets, and the layout that it comes to."""
        found = []
        for name, keys in series_of(self.study.file):
            cells = [(cell, config) for cell, config in self.cells if cell.series == name]
            found.append((name, ", ".join(f"{key} = {_plain(value)}" for key, value in keys.items()) or
                          "nothing", _layout(cells) if cells else "none: illegal on every size"))
        return found

    def _matters(self, key: str) -> bool:
        return key != "kernels.cross_entropy" or any(config.model.classes > 2 for _, config in self.cells)

    def _values(self, key: str) -> list[Any]:
        """The different values of a key in all cells; numbers ascending."""
        found: list[Any] = []
        for _, config in self.cells:
            value = value_of(config, key)
            found += [value] * (value not in found)
        return sorted(found) if all(isinstance(value, int) for value in found) else found


def value_of(config: Config, key: str) -> Any:
    """What a configuration holds under a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def shape(model: Any) -> str:
    """Of a model, in words."""
    return (f"{model.num_layers} layers of width {model.hidden_size:,} with {model.num_heads} heads and an MLP of "
            f"width {model.ffn_hidden_size:,}")


def _layout(cells: Sequence[tuple[Cell, Config]]) -> str:
    """Of the cells of a series, which differ in the degree of data parallelism alone."""
    config = cells[0][1]
    parallel, zero = config.parallel, config.zero
    copies = sorted({cell.size.processes // (parallel.tensor * parallel.pipeline * parallel.context)
                     for cell, _ in cells})
    return ", ".join((
        f"TP {parallel.tensor}" + " with SP" * (parallel.sequence and parallel.tensor > 1),
        f"PP {parallel.pipeline}" + f" (VPP {parallel.virtual_pipeline})" * (parallel.virtual_pipeline > 1),
        f"CP {parallel.context}", f"DP {copies[0]}" + f" to {copies[-1]}" * (len(copies) > 1),
        f"ZeRO-{zero.stage}" + " with optimizer states in host memory" * zero.offload_optimizer,
        f"recompute {parallel.recompute}"
        + f" ({', '.join(parallel.recompute_modules)})" * (parallel.recompute == "selective")))


def _sets(cell: Cell, key: str) -> bool:
    """Whether the cell's series, or its size, sets the key, a section that holds it, or a part of it."""
    return any(f"{each}.".startswith(f"{key}.") or f"{key}.".startswith(f"{each}.") for each in cell.values)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

"""grn-scale plan --search: the legal layouts that fit, by throughput, and why the first one wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import ConfigError
from grn_scale.planning.grn_layouts import legal_layouts
from grn_scale.planning.grn_machine import Machine
from grn_scale.planning.grn_time import step_time
from grn_scale.tools.plan_document import console, layout_text, most_bytes, nothing_fits, time_document

SHOWN = 10
"""Layouts that are listed."""


@dataclass(frozen=True)
class Ranked:
    """A legal layout that fits, as plain values."""

    layout: str
    settings: tuple[str, ...]
    distance: float
    most_bytes: int
    time: dict[str, Any]
    """Of `plan_document.throughput`."""
    kinds: dict[str, tuple[Any, ...]]
    """What tells layouts apart -> this one's."""
    estimated: bool = False
    """Its memory is one that the dry run cannot check, where it can check others."""

    @property
    def seconds(self) -> float:
        return self.time["step_seconds"]

    def document(self) -> dict[str, Any]:
        return {"layout": self.layout, "settings": list(self.settings), "most_bytes": self.most_bytes,
                "estimated": self.estimated, "time": self.time}


def rank(found: list[Ranked]) -> list[Ranked]:
    """Those whose memory can be checked before the others; of each, quickest first, of equals the nearest one."""
    return sorted(found, key=lambda each: (each.estimated, each.seconds, each.distance))


def ranked(config: Config, machine: Machine, tokens: float | None = None,
           price: float | None = None) -> tuple[list[Ranked], int]:
    """(legal layouts that fit, ranked; how many are legal)."""
    if not isinstance(config.model, ModelConfig):
        raise ConfigError("the model is a class-to-image model, which every process holds whole: there is no layout to "
                          "search; name a text/video model, e.g. model=configs/model/grn_2b.yaml")
    legal, found = list(legal_layouts(config, machine.gpus, machine.gpu.domain)), []
    for layout in legal:
        size = most_bytes(layout.config, machine)
        if size <= machine.limit:
            parallel, zero = layout.config.parallel, layout.config.zero
            kinds = {"degrees": (parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline),
                     "ZeRO stage": (zero.stage, zero.offload_optimizer),
                     "recomputation": (parallel.recompute, parallel.recompute_modules)}
            time = time_document(layout.config, machine, step_time(layout.config, machine), tokens, price)
            found.append(Ranked(layout_text(layout.config, machine), layout.settings, layout.distance, size, time,
                                kinds, estimated=zero.stage == 3 or zero.offload_optimizer))
    return rank(found), len(legal)


def search_document(gpu: str, gpus: int, sizes: dict[str, int], found: tuple[list[Ranked], int],
                    remedies: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The best layouts as plain values. sizes: bytes of a GPU (gpu_bytes) and what of it a plan may fill (limit_bytes);
    remedies: what nearest layouts there are, asked where none fits.

    Where layouts that the dry run can check fit, `layouts` are those, and `estimated` the best of the others.
    """
    fitting, legal = found
    layouts = [each for each in fitting if each.estimated == fitting[0].estimated]
    estimated = fitting[len(layouts):]
    return {"gpu": gpu, "gpus": gpus, **sizes, "legal": legal, "fitting": len(fitting),
            "seconds": seconds, "layouts": [each.document() for each in layouts[:SHOWN]],
            "estimated": estimated[0].document() if estimated else None,
            "why": why(layouts, estimated, sizes["gpu_bytes"]) if layouts else [nothing_fits(remedies())]}


def why(layouts: list[Ranked], estimated: list[Ranked], gpu_bytes: int) -> list[str]:
    """Sentences: what the first layout spends less on than the best one of each other kind, and what it leaves free."""
    first, sentences = layouts[0], []
    for name, own in first.kinds.items():
        other = next((each for each in layouts if each.kinds[name] != own), None)
        if other is not None:
            sentences.append(f"other {name}: {other.layout} takes {other.seconds / first.seconds - 1:+.1%}, "
                             f"{_reason(first.time['parts'], other.time['parts'])}")
    if first.estimated:
        sentences.append("its memory is an estimate that no dry run has checked; ZeRO-1 and 2 without offload can be "
                         "(--exact), but none of those fits")
    elif estimated:
        other = estimated[0]
        sentences.append(f"ranked apart, since their memory is an estimate that --exact cannot check, are ZeRO-3 and "
                         f"offload: the quickest is {other.layout}, {other.seconds / first.seconds - 1:+.1%}, "
                         f"{other.most_bytes / 1e9:.1f} GB ({' '.join(other.settings) or 'as it is'})")
    free = (gpu_bytes - first.most_bytes) / 1e9
    sentences.append(f"it leaves {free:.1f} of {gpu_bytes / 1e9:.0f} GB free on the fullest rank")
    return sentences


def _reason(first: dict[str, float], other: dict[str, float]) -> str:
    """Where the other one spends most more."""
    more = {name: other.get(name, 0.0) - first.get(name, 0.0) for name in {**first, **other}}
    name = max(more, key=lambda part: more[part])
    return f"most of it {name} ({more[name]:+.3g} s)" if more[name] > 0 else "with the same parts"


def show_search(result: dict[str, Any]) -> None:
    """Print the best layouts as a table, and why the first one wins."""
    from rich import box
    from rich.table import Table

    out = console()
    table = Table("", "layout", "GB", "s/step", "tokens/s/GPU", "MFU", "settings", box=box.SIMPLE, pad_edge=False,
                  collapse_padding=True)
    out.print(f"{result['gpus']} x {result['gpu']}: {result['fitting']} of {result['legal']} legal layouts fit "
              f"the {result['limit_bytes'] / 1e9:.1f} GB of the GPU's {result['gpu_bytes'] / 1e9:.1f} that a plan may "
              f"fill ({result['seconds']:.1f} s)")
    for number, each in enumerate(result["layouts"], 1):
        time = each["time"]
        table.add_row(str(number), each["layout"], f"{each['most_bytes'] / 1e9:.1f}", f"{time['step_seconds']:.3g}",
                      f"{time['tokens_per_second_per_gpu']:,.0f}", f"{time['mfu']:.1%}",
                      "\n".join(each["settings"]).replace("[", r"\[") or "as it is")
    if result["layouts"]:
        out.print(table)
        out.print("why number 1:")
    out.print(*(f"  {sentence}" for sentence in result["why"]), sep="\n", markup=False)

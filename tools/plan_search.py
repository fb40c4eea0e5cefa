"""grn-scale plan --search: the legal layouts that fit, by throughput, and why the first one wins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grn_scale.config.schema import Config, ModelConfig
from grn_scale.errors import ConfigError
from grn_scale.planning.grn_layouts import Layout, legal_layouts
from grn_scale.planning.grn_machine import Machine
from grn_scale.planning.grn_time import StepTime, step_time
from grn_scale.tools.plan_document import console, layout_text, most_bytes, nothing_fits, remedies, time_document

SHOWN = 10
"""Layouts that are listed."""


@dataclass(frozen=True)
class Ranked:
    layout: Layout
    most_bytes: int
    step: StepTime


def ranked(config: Config, machine: Machine) -> tuple[list[Ranked], int]:
    """(legal layouts that fit, quickest first, of equals the one nearest to the configuration; how many are legal)."""
    if not isinstance(config.model, ModelConfig):
        raise ConfigError("the model is a class-to-image model, which every process holds whole: there is no layout to "
                          "search; name a text/video model, e.g. model=configs/model/grn_2b.yaml")
    legal = list(legal_layouts(config, machine.gpus, machine.reach))
    fitting = [Ranked(layout, size, step_time(layout.config, machine)) for layout in legal
               if (size := most_bytes(layout.config, machine)) <= machine.memory]
    return sorted(fitting, key=lambda each: (each.step.seconds, each.layout.distance)), len(legal)


def search_document(config: Config, machine: Machine, found: tuple[list[Ranked], int], tokens: float | None,
                    price: float | None, seconds: float) -> dict[str, Any]:
    """The best layouts as plain values."""
    layouts, legal = found
    shown = [{"layout": layout_text(each.layout.config, machine), "settings": list(each.layout.settings),
              "most_bytes": each.most_bytes,
              "time": time_document(each.layout.config, machine, each.step, tokens, price)}
             for each in layouts[:SHOWN]]
    result = {"gpu": machine.gpu.name, "gpus": machine.gpus, "gpu_bytes": machine.memory, "legal": legal,
              "fitting": len(layouts), "seconds": seconds, "layouts": shown, "why": why(config, machine, layouts)}
    if not layouts:
        result["why"] = [nothing_fits(remedies(config, machine))]
    return result


def why(config: Config, machine: Machine, layouts: list[Ranked]) -> list[str]:
    """Sentences: what the first layout spends less on than the best one of each other kind, and what it leaves free."""
    if not layouts:
        return []
    first, sentences = layouts[0], []
    for name, key in (("degrees", _degrees), ("ZeRO stage", _zero), ("recomputation", _recompute)):
        other = next((each for each in layouts if key(each) != key(first)), None)
        if other is not None:
            sentences.append(f"other {name}: {layout_text(other.layout.config, machine)} takes "
                             f"{other.step.seconds / first.step.seconds - 1:+.1%}, {_reason(first.step, other.step)}")
    zero = first.layout.config.zero
    if zero.stage == 3 or zero.offload_optimizer:
        sentences.append("its memory is an estimate that no dry run has checked; ZeRO-1 and 2 without offload can be "
                         "(--exact)")
    free = (machine.memory - first.most_bytes) / 1e9
    sentences.append(f"it leaves {free:.1f} of {machine.memory / 1e9:.0f} GB free on the fullest rank")
    return sentences


def _degrees(each: Ranked) -> tuple[int, ...]:
    parallel = each.layout.config.parallel
    return parallel.tensor, parallel.context, parallel.pipeline, parallel.virtual_pipeline


def _zero(each: Ranked) -> tuple[int, bool]:
    return each.layout.config.zero.stage, each.layout.config.zero.offload_optimizer


def _recompute(each: Ranked) -> tuple[str, tuple[str, ...]]:
    parallel = each.layout.config.parallel
    return parallel.recompute, parallel.recompute_modules


def _reason(first: StepTime, other: StepTime) -> str:
    """Where the other one spends most more."""
    more = {name: other.parts.get(name, 0.0) - first.parts.get(name, 0.0) for name in {**first.parts, **other.parts}}
    name = max(more, key=lambda part: more[part])
    return f"most of it {name} ({more[name]:+.3g} s)" if more[name] > 0 else "with the same parts"


def show_search(result: dict[str, Any]) -> None:
    """Print the best layouts as a table, and why the first one wins."""
    from rich import box
    from rich.table import Table

    out = console()
    table = Table("", "layout", "GB", "s/step", "tokens/s/GPU", "MFU", "settings", box=box.SIMPLE, pad_edge=False,
                  collapse_padding=True, title_justify="left",
                  title=f"{result['gpus']} x {result['gpu']}: {result['fitting']} of {result['legal']} legal layouts "
                        f"fit {result['gpu_bytes'] / 1e9:.0f} GB ({result['seconds']:.1f} s)")
    for number, each in enumerate(result["layouts"], 1):
        time = each["time"]
        table.add_row(str(number), each["layout"], f"{each['most_bytes'] / 1e9:.1f}", f"{time['step_seconds']:.3g}",
                      f"{time['tokens_per_second_per_gpu']:,.0f}", f"{time['mfu']:.1%}",
                      "\n".join(each["settings"]).replace("[", r"\[") or "as it is")
    if result["layouts"]:
        out.print(table)
    out.print(*(f"  {sentence}" for sentence in result["why"]), sep="\n", soft_wrap=True, markup=False)

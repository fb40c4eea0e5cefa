"""A plan as plain values, and those as tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grn_scale.config.schema import Config
from grn_scale.planning.grn_budget import Assumed, Budget, budget
from grn_scale.planning.grn_layouts import Layout, legal_layouts
from grn_scale.planning.grn_machine import Machine
from grn_scale.planning.grn_memory import StageMemory, step_memory
from grn_scale.planning.grn_time import StepTime, step_time
from grn_scale.planning.hardware import load_efficiencies

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 120
"""Columns of tables where stdout is no terminal."""
CATEGORIES = ("weights", "gradients", "optimizer", "average", "batches", "buffers", "activations", "peak")
MOST_STAGES = 8
"""Pipeline stages that are shown side by side."""
NEAREST = 3
"""Layouts that fit which are named where the one asked for does not."""
DAY = 86400


def budgets(config: Config, machine: Machine) -> list[tuple[StageMemory, Budget]]:
    """What a rank of each pipeline stage holds."""
    return [(memory, budget(config, machine.gpus, machine.gpus_per_node, memory))
            for memory in step_memory(config, machine.gpus)]


def most_bytes(config: Config, machine: Machine) -> int:
    """Of the stage and the phase that take most."""
    return max(held.most for _, held in budgets(config, machine))


def document(config: Config, machine: Machine, tokens: float | None, price: float | None) -> dict[str, Any]:
    """Memory by stage, phase and category, verdict, step time and cost."""
    stages = budgets(config, machine)
    most = max(held.most for _, held in stages)
    fits = most <= machine.limit
    verdict: dict[str, Any] = {"fits": fits, "most_bytes": most, "limit_bytes": machine.limit,
                               "gpu_bytes": machine.memory, "nearest": [], "smallest": None}
    if not fits:
        verdict |= remedies(config, machine)
    return {
        "gpu": machine.gpu.name, "nodes": machine.nodes, "gpus_per_node": machine.gpus_per_node, "gpus": machine.gpus,
        "layout": layout_text(config, machine), "verdict": verdict,
        "stages": [{"stage": memory.stage, "ranks": memory.ranks, "parameters": memory.parameters,
                    "bytes": memory.bytes, "beside": held.beside, "phases": held.phases, "host": held.host}
                   for memory, held in stages],
        "host_bytes_per_node": machine.gpus_per_node * max(max(held.host.values()) for _, held in stages),
        "time": time_document(config, machine, step_time(config, machine), tokens, price),
        "assumed": [*machine.assumed(), *_assumed(config)]}


def layout_text(config: Config, machine: Machine) -> str:
    """The layout in the field's short words: DP16 x TP4 x PP2 (VPP2) x CP1, ZeRO-1, recompute selective (mlp)."""
    parallel, zero = config.parallel, config.zero
    copies = machine.gpus // (parallel.tensor * parallel.pipeline * parallel.context)
    words = [f"DP{copies}", f"TP{parallel.tensor}" + ("+SP" if parallel.sequence and parallel.tensor > 1 else "")]
    words.append(f"PP{parallel.pipeline}" + (f" VPP{parallel.virtual_pipeline}" * (parallel.virtual_pipeline > 1)))
    words.append(f"CP{parallel.context}")
    modules = f" ({'+'.join(parallel.recompute_modules)})" if parallel.recompute == "selective" else ""
    return (f"{' x '.join(words)}, ZeRO-{zero.stage}{' offloaded' if zero.offload_optimizer else ''}, recompute "
            f"{parallel.recompute}{modules}")


def remedies(config: Config, machine: Machine) -> dict[str, Any]:
    """The nearest layouts that fit, and the one that takes least, as fields of the verdict."""
    found: list[tuple[Layout, int]] = [(layout, most_bytes(layout.config, machine))
                                       for layout in legal_layouts(config, machine.gpus, machine.gpu.domain)]
    fitting = sorted((each for each in found if each[1] <= machine.limit),
                     key=lambda each: (each[0].distance, -each[1]))
    least = min(found, key=lambda each: each[1], default=None)
    return {"nearest": [{"settings": list(layout.settings), "most_bytes": size} for layout, size in fitting[:NEAREST]],
            "smallest": least and {"settings": list(least[0].settings), "most_bytes": least[1]},
            "batch": "data.packs_per_step", "length": "data.token_budget"}


def time_document(config: Config, machine: Machine, step: StepTime, tokens: float | None,
                  price: float | None) -> dict[str, Any]:
    """Throughput of a GRN step, and what a token target costs."""
    return throughput(step.seconds, step.parts, step.hidden, step.tokens, machine.gpus,
                      step.share_of_peak(step.flops, machine), step.share_of_peak(step.hardware_flops, machine),
                      tokens, price)


def throughput(seconds: float, parts: dict[str, float], hidden: dict[str, float], step_tokens: float, gpus: int,
               mfu: float, hfu: float, tokens: float | None, price: float | None) -> dict[str, Any]:
    """A step's time, and what a target of `tokens` takes and costs at `price` for a GPU hour, as plain values."""
    rate = step_tokens / seconds
    return {"step_seconds": seconds, "parts": parts, "hidden": hidden, "tokens_per_step": step_tokens,
            "tokens_per_second": rate, "tokens_per_second_per_gpu": rate / gpus, "mfu": mfu, "hfu": hfu,
            "target_tokens": tokens, "days": tokens and tokens / rate / DAY,
            "gpu_hours_per_1e9_tokens": 1e9 / rate * gpus / 3600,
            "cost_per_1e9_tokens": price and 1e9 / rate * gpus / 3600 * price,
            "cost": price and tokens and tokens / rate * gpus / 3600 * price}


def _assumed(config: Config) -> list[str]:
    assumed = Assumed()
    words = [f"beside tensors: {assumed.context / 1e9:.2f} GB CUDA context, {assumed.workspace / 1e9:.2f} GB "
             f"workspaces, {assumed.communicator / 1e9:.2f} GB for each NCCL communicator, "
             f"{load_efficiencies().fragmentation:.0%} of what comes and goes for the allocator",
             f"every pack is full; in memory one video with a caption of {config.text.max_tokens} tokens, in time "
             f"clips of tokenize.max_frames={config.tokenize.max_frames}, "
             f"tokenize.latent_side={config.tokenize.latent_side}",
             "loading data hides behind computation; ranks are equally fast"]
    if config.text.states == "none":
        words.append("text.states=none: a UMT5-XXL encoder runs in training")
    if config.zero.stage == 3 or config.zero.offload_optimizer:
        words.append("memory of ZeRO-3 and of offload is an estimate that no dry run has checked")
    return words


def console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def show(result: dict[str, Any]) -> None:
    """Print the plan."""
    out = console()
    out.print(f"{result['gpus']} x {result['gpu']} ({result['nodes']} node{'s' * (result['nodes'] > 1)} of "
              f"{result['gpus_per_node']}): "
              f"{result['layout']}", soft_wrap=True)
    show_memory(out, result["stages"])
    show_verdict(out, result["verdict"])
    if result["host_bytes_per_node"] is not None:
        out.print(f"host memory of a node, which is not judged: {result['host_bytes_per_node'] / 1e9:.1f} GB beside "
                  "what processes and data loading take")
    show_time(out, result["time"])
    if "exact" in result:
        show_exact(out, result["exact"])
    out.print("\nassumed:", *(f"  {words}" for words in result["assumed"]), sep="\n", markup=False)


def show_memory(out: Console, stages: list[dict[str, Any]]) -> None:
    """Print what a rank of each stage holds: of many stages the first two, the fullest and the last."""
    from rich import box
    from rich.table import Table

    if len(stages) > MOST_STAGES:
        fullest = max(stages, key=lambda each: max(each["phases"].values()))["stage"]
        stages = [stages[number] for number in sorted({0, 1, fullest, len(stages) - 1})]
    out.print("\nwhat a rank of each pipeline stage holds")
    table = Table("GB", *(each.get("name", f"stage {each.get('stage')}") for each in stages), box=box.SIMPLE,
                  pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("ranks alike", *(str(each["ranks"]) for each in stages))
    for name in stages[0]["bytes"]:
        label = "peak of tensors in a step" if name == "peak" else name
        table.add_row(label, *_gigabytes(each["bytes"][name] for each in stages), end_section=name == "peak")
    for name in stages[0]["beside"]:
        table.add_row(name, *_gigabytes(each["beside"][name] for each in stages))
    for name in ("load", "step", "save"):
        label = f"GPU, phase {name}"
        table.add_row(label, *_gigabytes(each["phases"][name] for each in stages))
    for name in stages[0]["host"]:
        table.add_row(f"host, phase {name}", *_gigabytes(each["host"][name] for each in stages))
    out.print(table)


def _gigabytes(sizes: Iterable[int]) -> list[str]:
    return [f"{size / 1e9:.2f}" for size in sizes]


def show_verdict(out: Console, verdict: dict[str, Any]) -> None:
    """Print whether it fits, and what would."""
    most, limit, whole = (verdict[name] / 1e9 for name in ("most_bytes", "limit_bytes", "gpu_bytes"))
    out.print(f"{'fits' if verdict['fits'] else 'DOES NOT FIT'}: {most:.1f} GB of {limit:.1f}, which is what a plan "
              f"may fill of the GPU's {whole:.1f}", soft_wrap=True)
    if verdict["fits"]:
        return
    for near in verdict["nearest"]:
        out.print(f"  would fit ({near['most_bytes'] / 1e9:.1f} GB): {' '.join(near['settings'])}", markup=False,
                  soft_wrap=True)
    if not verdict["nearest"]:
        out.print(f"  {nothing_fits(verdict)}", markup=False, soft_wrap=True)


def nothing_fits(verdict: dict[str, Any]) -> str:
    """What to do where no layout fits."""
    least, batch, length = verdict["smallest"], verdict["batch"], verdict["length"]
    if least is None:
        return (f"no layout is legal on so many GPUs: {batch} and the degrees must divide them; take other --nodes, or "
                f"another {batch}")
    return (f"no layout fits on so many GPUs: the smallest takes {least['most_bytes'] / 1e9:.1f} GB "
            f"({' '.join(least['settings']) or 'the one given'}); take more --nodes, GPUs with more memory (--gpu), a "
            f"smaller {length} or a smaller model")


def show_time(out: Console, time: dict[str, Any]) -> None:
    """Print the step's parts and what follows from them."""
    from rich import box
    from rich.table import Table

    seconds, hidden = time["step_seconds"], time["hidden"]
    out.print(f"\na step takes {seconds:.3g} s")
    table = Table("part", "seconds", "share", "hidden behind computation", box=box.SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in sorted(time["parts"] | hidden, key=lambda part: -time["parts"].get(part, 0.0)):
        value = time["parts"].get(name, 0.0)
        table.add_row(name, f"{value:.3g}", f"{value / seconds:.1%}", f"{hidden[name]:.3g}" if name in hidden else "")
    out.print(table)
    out.print(f"{time['tokens_per_second']:,.0f} tokens/s ({time['tokens_per_second_per_gpu']:,.0f} a GPU), MFU "
              f"{time['mfu']:.1%}, HFU {time['hfu']:.1%}; {time['gpu_hours_per_1e9_tokens']:,.1f} GPU hours for 10^9 "
              "tokens" + (f", {time['cost_per_1e9_tokens']:,.0f} at the price given" if time["cost_per_1e9_tokens"]
                          else ""), soft_wrap=True)
    if time["days"]:
        out.print(f"{time['target_tokens']:.3g} tokens take {time['days']:,.1f} days without failures" + (
            f" and cost {time['cost']:,.0f}" if time["cost"] else ""), soft_wrap=True)


def show_exact(out: Console, exact: dict[str, Any]) -> None:
    """Print the dry run beside the plan of the same operations."""
    from rich import box
    from rich.table import Table

    table = Table("stage", "", *CATEGORIES, box=box.SIMPLE, pad_edge=False, collapse_padding=True, title_justify="left",
                  title="\ndry run and plan of the operations of a CPU (GB)")
    for column in table.columns[2:]:
        column.justify = "right"
    for each in exact["classes"]:
        for name in ("tried", "planned"):
            table.add_row(str(each["stage"]), name, *(f"{each[name][key] / 1e9:.3f}" for key in CATEGORIES))
        table.add_row("", "off", *(f"{each['errors'][key]:+.2%}" for key in CATEGORIES))
    out.print(table)
    out.print(f"{exact['parameters']:,} parameters ({exact['parameters'] / 1e9:.3f} B) in all, copies counted once; "
              f"off: as a share of the peak; {exact['seconds']:.0f} s", soft_wrap=True)
    for difference in exact["differences"]:
        out.print(f"differs from the model: {difference}", soft_wrap=True, markup=False)

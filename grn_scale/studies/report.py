"""The report of a study: report.md, and report.html with its pictures inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grn_scale.atomic import write_bytes
from grn_scale.errors import UserError
from grn_scale.studies import pictures
from grn_scale.studies.configuration import DEGREES, Settings, shape
from grn_scale.studies.page import Heading, Items, Part, Pictures, Table, Text, markdown, page
from grn_scale.studies.predicted import Prediction, check_hardware, predict
from grn_scale.studies.results import MEASURED, differences
from grn_scale.studies.study import PACKS, Study
from grn_scale.studies.summary import CONFIDENCE, Interval, summarize

Rows = Sequence[Mapping[str, Any]]
NOT_KNOWN = "not known"
WHERE = {"cluster": "Cluster", "gpu": "GPU", "cpu": "CPU of the first node", "cores": "Cores that a job's process sees",
         "interconnect": "Interconnect, as the cluster file sets it",
         "network_gigabytes_per_second": "Sum over the nodes' links before the start (GB/s)", "driver": "NVIDIA driver",
         "cuda": "CUDA", "nccl": "NCCL", "torch": "torch", "megatron_core": "megatron-core", "deepspeed": "DeepSpeed",
         "python": "Python", "system": "System", "image": "Container image", "commit": "Commit of grn_scale"}

PLANNED = ("computing", "exchanges", "bubble", "update", "other")
"""Parts of a prediction, in the order of its table."""
OF_GPUS = ("driver", "cuda", "nccl")
"""Said to be unknown only where there were GPUs."""


def write_report(study: Study, rows: Rows, hardware: str = "") -> list[dict[str, Any]]:
    """Write report.md and report.html into the study; the summary rows. UserError where nothing is measured.

    hardware: what predictions count with, see `predict`; ConfigError where it is no hardware.
    """
    check_hardware(hardware)
    lines = summarize(rows)
    if not lines:
        states = ", ".join(f"{row['cell']}: {row['state']}" for row in rows[:5])
        raise UserError(f"{study.folder} has no measured cell ({states or 'nor any other'}): submit, wait for the "
                        "jobs, and collect again")
    plans = [predict(study, line, rows, hardware) for line in lines]
    parts = list(_parts(study, rows, lines, plans))
    write_bytes(study.folder / "report.md", markdown(parts).encode())
    write_bytes(study.folder / "report.html", page(f"Scaling study: {study.file.name}", parts).encode())
    return lines


def _parts(study: Study, rows: Rows, lines: Rows, plans: Sequence[Prediction | str]) -> Iterator[Part]:
    yield Heading(f"Scaling study: {study.file.name}", 1)
    settings = Settings.read(study)
    yield from _opening(settings, rows, lines)
    yield from _throughput(lines)
    yield from _time(lines)
    yield from _memory(lines, plans)
    yield from _plan(lines, plans)
    yield Heading("Suspicious cells")
    found = [(row["cell"], row["flags"]) for row in rows if row.get("flags")]
    mixed = [("all", f"cells differ in what they should share: {each}") for each in differences(rows)]
    yield Table(("cell", "why"), [*mixed, *found], words=2) if mixed or found else Text("None.")
    yield Heading("Cells without a result")
    missing = [(row["cell"], row["state"], row["reason"]) for row in rows if row["state"] != MEASURED]
    missing += [(f"{each['series']} on {each['size']}", "illegal", each["reason"]) for each in study.illegal]
    yield Table(("cell", "state", "reason"), missing, words=3) if missing else Text("None.")
    yield from _configuration(settings)
    yield from _where(rows)
    yield from _runs(rows)


def _opening(settings: Settings, rows: Rows, lines: Rows) -> Iterator[Part]:
    """What was asked, and what came out, for somebody who was not there."""
    study, measured = settings.study, [row for row in rows if row["state"] == MEASURED]
    file = study.file
    best = max(lines, key=lambda line: line["throughput"].value)
    grows = ("The work of a step grows with the number of processes (weak scaling)" if file.mode == "weak" else
             "The work of a step is the same for all sizes (strong scaling)")
    varied = f"{len(file.layouts)} layouts" if len(file.layouts) > 1 else "one layout"
    axes = f" and the values of {', '.join(file.axes)}" if file.axes else ""
    yield Text(f"How does training scale on {', '.join(size.label for size in file.processes)} processes? {grows}. "
               f"Compared are {varied}{axes}, with {file.repeats} run{'s' * (file.repeats > 1)} of each. "
               f"{len(measured)} of {len(rows)} runs are measured.")
    device = _values(measured, "gpu") or f"{_values(measured, 'cpu') or 'an unknown processor'}, without a GPU"
    yield Items([f"model: {settings.told('model', shape)}", f"precision: {settings.told('train.precision')}",
                 f"tokens of a pack: {settings.told('data.token_budget', '{:,}'.format)}",
                 f"packs of a step, over all processes: {settings.told(PACKS)}",
                 f"ran on {device}, cluster {_values(measured, 'cluster') or NOT_KNOWN}"])
    yield Table(("series", "what it sets", "layout"), settings.layouts(), words=3)
    yield Text(f"{DEGREES} What all series start from stands under Configuration.")
    crowded = sorted({row["processes_per_node"] for row in measured if not row.get("gpu") and row.get("cores")
                      and (row.get("processes_per_node") or 0) > row["cores"]})
    if crowded:
        yield Text(f"Cells with {', '.join(map(str, crowded))} processes a node share {_values(measured, 'cores')} "
                   "cores: their efficiency says nothing about GPUs, or about nodes with a core for each process.")
    yield Text(f"The highest throughput is {best['throughput'].value:,.0f} tokens/s, of {best['series']} on "
               f"{best['size']} processes, at an efficiency of {best['efficiency'].value:.0%}.")
    yield Text(f"How it was measured: every run takes {study.steps} steps with the same seed and data; the first "
               f"{file.warmup_steps} are left out. Nothing is validated or saved meanwhile. Throughput is tokens over "
               "time of the other steps, padding not counted; its mean over the runs of a size is the geometric one, "
               f"with a {CONFIDENCE:.0%} confidence interval (Student's t of the logarithms). Two runs give a very "
               "wide interval, one gives none. Efficiency is throughput a process over that of the smallest measured "
               "size of the same series.")


def _values(rows: Rows, key: str) -> str:
    """The different values of a column; empty where none is known."""
    return ", ".join(sorted({str(row[key]) for row in rows if row.get(key) is not None}))


def _throughput(lines: Rows) -> Iterator[Part]:
    yield Heading("Throughput and efficiency")
    yield Pictures([picture for part, which in pictures.few(lines) for picture in (
        (pictures.throughput(part), "Throughput over the number of processes. Bars are confidence intervals; those "
         f"longer than the picture are cut.{which}"),
        (pictures.efficiency(part), f"Efficiency over the number of processes.{which}"))])
    yield Table(("series", "processes", "runs", "tokens/s", "interval (tokens/s)", "tokens/s a process", "efficiency",
                 "interval", "against, processes", "MFU", "HFU"), [
        (line["series"], line["size"], line["repeats"], f"{line['throughput'].value:,.0f}",
         _interval(line["throughput"], "{:,.0f}".format), f"{line['throughput'].value / line['processes']:,.0f}",
         f"{line['efficiency'].value:.0%}", _interval(line["efficiency"], "{:.0%}".format), line["base"],
         _show(line["mfu"], "{:.1%}".format), _show(line["hfu"], "{:.1%}".format)) for line in lines]).without_empty()
    if all(line["mfu"] is None for line in lines):
        yield Text("MFU and HFU are shares of a GPU's peak; these runs had none whose peak is known.")


def _time(lines: Rows) -> Iterator[Part]:
    yield Heading("What the time of a step goes to")
    yield Pictures([(pictures.step_parts(part), f"Median time of a step by part.{which}")
                    for part, which in pictures.few(lines)])
    parts = ("data_wait_seconds", "forward_backward_seconds", "optimizer_seconds")
    yield Table(("series", "processes", "step (s)", "waiting for data (s)", "forward and backward (s)",
                 "gradient reduction and optimizer (s)", "everything else (s)", "waiting for data (share)"), [
        (line["series"], line["size"], f"{line['step_seconds']:.3g}", *(_show(line[part], "{:.3g}".format)
         for part in parts), f"{max(0.0, line['step_seconds'] - sum(line[part] or 0.0 for part in parts)):.2g}",
         f"{line['data_wait_share']:.1%}") for line in lines])


def _memory(lines: Rows, plans: Sequence[Prediction | str]) -> Iterator[Part]:
    yield Heading("Peak memory of the fullest process")
    known = [(line, plan) for line, plan in zip(lines, plans) if line["peak_memory_bytes"] is not None]
    if not known:
        yield Text("The runs recorded none.")
        return
    on_gpu = known[0][0]["peak_memory_of"] == "GPU"
    if not on_gpu:
        yield Text("Without a GPU this is the resident memory of the process: interpreter and libraries are in it, so "
                   "it is not compared with the planner, which counts tensors.")
        yield Table(("series", "processes", "peak (GB)"), [
            (line["series"], line["size"], _gigabytes(line["peak_memory_bytes"])) for line, _ in known])
        return
    yield Table(("series", "processes", "tensors (GB)", "held by the allocator (GB)", "predicted tensors (GB)",
                 "prediction off by"), [
        (line["series"], line["size"], _gigabytes(line["peak_memory_bytes"]), _gigabytes(line["peak_reserved_bytes"]),
         _gigabytes(plan.memory) if isinstance(plan, Prediction) else "",
         f"{plan.memory / line['peak_memory_bytes'] - 1:+.1%}" if isinstance(plan, Prediction) else "")
        for line, plan in known])


def _plan(lines: Rows, plans: Sequence[Prediction | str]) -> Iterator[Part]:
    yield Heading("Predicted and measured")
    found = [(line, plan) for line, plan in zip(lines, plans) if isinstance(plan, Prediction)]
    reasons = dict.fromkeys(plan for plan in plans if isinstance(plan, str))
    yield from (Text(f"No prediction: {reason}.") for reason in reasons)
    if not found:
        return
    errors = sorted(abs(plan.seconds / line["step_seconds"] - 1) for line, plan in found)
    yield Text("What the planner (grn-scale plan) says of the same configurations. The time of a step is off by "
               f"{errors[len(errors) // 2]:.0%} in the median, by {errors[-1]:.0%} at most.")
    known = {line["cell"]: plan for line, plan in found}
    yield Pictures([(pictures.against_plan([(line, known[line["cell"]]) for line in part]), "A point is a series on as "
                     "many processes as the number beside it says. Above the diagonal a step takes longer than "
                     f"predicted.{which}") for part, which in pictures.few([line for line, _ in found])])
    yield Table(("series", "processes", "measured step (s)", "predicted step (s)", "prediction off by",
                 "predicted tokens/s", "computing (s)", "exchanges (s)", "bubble (s)", "reduction and optimizer (s)",
                 "other (s)"), [
        (line["series"], line["size"], f"{line['step_seconds']:.3g}", f"{plan.seconds:.3g}",
         f"{plan.seconds / line['step_seconds'] - 1:+.0%}", f"{plan.tokens_per_second:,.0f}",
         *(f"{plan.parts[part]:.2g}" if plan.parts[part] else "" for part in PLANNED)) for line, plan in found],
        ).without_empty()
    yield Text("The prediction assumes:")
    yield Items([*dict.fromkeys(words for _, plan in found for words in plan.assumed),
                 "packs are full, and clips have tokenize.max_frames frames and captions of text.max_tokens tokens",
                 "ranks are equally fast, and loading data hides behind computation"])


def _configuration(settings: Settings) -> Iterator[Part]:
    yield Heading("Configuration")
    yield Text("What all series start from, defaults included; the table of series at the top says what each sets. "
               "The whole configuration of a cell is its cells/CELL/config.yaml.")
    yield Table(("key", "value", "what it is"), settings.table(), words=3)


def _where(rows: Rows) -> Iterator[Part]:
    yield Heading("Where it ran")
    measured = [row for row in rows if row["state"] == MEASURED]
    with_gpu = bool(_values(measured, "gpu"))
    facts = [(name, _values(measured, key) or NOT_KNOWN) for key, name in WHERE.items()
             if _values(measured, key) or (with_gpu and key in OF_GPUS)]
    grids = sorted({(row["node_count"], row["processes_per_node"]) for row in measured
                    if row.get("node_count") and row.get("processes_per_node")})
    facts.insert(1, ("Nodes x processes of each", ", ".join(f"{nodes} x {each}" for nodes, each in grids) or NOT_KNOWN))
    if any(row.get("dirty") for row in measured):
        facts.append(("Uncommitted changes", "yes: the commit alone does not tell what ran"))
    yield Table(("what", "value"), facts, words=2)


def _runs(rows: Rows) -> Iterator[Part]:
    yield Heading("Every run")
    yield Text("A cell that failed is run again in a new attempt. results.csv has all columns.")
    yield Table(("cell", "state", "attempt", "job", "nodes", "began (UTC)", "configuration (SHA-256)", "failed before",
                 "tokens/s"), [
        (row["cell"], row["state"], (row.get("attempt") or "").removeprefix("attempt-").lstrip("0"),
         row.get("job") or "", row.get("nodes") or "", _date(row.get("began")), (row.get("config_sha256") or "")[:12],
         row.get("failed_before") or "", _show(row.get("tokens_per_second"), "{:,.0f}".format)) for row in rows],
        words=8).without_empty()


def _date(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


def _interval(value: Interval, form: Callable[[float], str]) -> str:
    return "" if value.low is None or value.high is None else f"{form(value.low)} to {form(value.high)}"


def _show(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)

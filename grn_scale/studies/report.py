"""The report of a study: report.md, and report.html with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from grn_scale.atomic import write_bytes
from grn_scale.errors import UserError
from grn_scale.studies.results import MEASURED, summarize
from grn_scale.studies.study import Study

Rows = Sequence[Mapping[str, Any]]
_STYLE = ("body{font:16px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
          "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:right}"
          "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:1em}")
_NUMBERS = ("series", "processes", "repeats", "tokens/s", "95 % interval", "efficiency", "against, processes",
            "step, s", "waits for data",
            "forward and backward, s", "optimizer, s", "MFU", "HFU")


def write_report(study: Study, rows: Rows) -> list[dict[str, Any]]:
    """Write report.md and report.html into the study; the summary rows. UserError where nothing is measured."""
    summary = summarize(rows)
    if not summary:
        states = ", ".join(f"{row['cell']}: {row['state']}" for row in rows[:5])
        raise UserError(f"{study.folder} has no measured cell ({states}): submit, wait for the jobs, and collect again")
    parts = _parts(study, rows, summary)
    write_bytes(study.folder / "report.md", _markdown(parts).encode())
    write_bytes(study.folder / "report.html", _html(study, parts, _picture(summary)).encode())
    return summary


def _parts(study: Study, rows: Rows, summary: Rows) -> list[tuple[str, Any]]:
    """Headings and paragraphs as text, tables as lists of rows whose first is the head."""
    file, first = study.file, next(row for row in rows if row["state"] == MEASURED)
    measured = sum(row["state"] == MEASURED for row in rows)
    best = max(summary, key=lambda row: row["tokens_per_second"])
    text = (f"{file.mode.capitalize()} scaling on {', '.join(map(str, file.processes))} processes: {measured} of "
            f"{len(rows)} cells are measured. Each run takes {study.steps} steps, of which the first "
            f"{file.warmup_steps} are left out; seed and data are the same in all. It ran on "
            f"{first['nodes'] or 'unknown'} with torch {first['torch'] or 'unknown'}, at commit "
            f"{first['commit'] or 'unknown'}. The highest "
            f"throughput is {best['tokens_per_second']:,.0f} tokens/s, of {best['series']} on {best['processes']} "
            f"processes at an efficiency of {best['efficiency']:.0%}. Efficiency is throughput a process over that of "
            "the smallest measured cell of the series.")
    parts: list[tuple[str, Any]] = [("h1", f"Scaling study {file.name}"), ("p", text), ("picture", ""),
                                    ("h2", "Results"), ("table", [_NUMBERS, *(_line(row) for row in summary)]),
                                    ("p", "Peak memory is not in the metrics of runs, and no prediction is compared.")]
    flagged = [(row["cell"], row["flags"]) for row in rows if row.get("flags")]
    parts += [("h2", "Suspicious cells"), ("table", [("cell", "why"), *flagged]) if flagged else ("p", "None.")]
    missing = [(row["cell"], row["state"], row["reason"]) for row in rows if row["state"] != MEASURED]
    missing += [(f"{each['series']}-p{each['processes']}", "illegal", each["reason"]) for each in study.illegal]
    parts += [("h2", "Cells without a result"),
              ("table", [("cell", "state", "reason"), *missing]) if missing else ("p", "None.")]
    settings = {"config": file.config or "defaults", "set": file.set, "layouts": file.layouts, "axes": file.axes}
    return [*parts, ("h2", "Configuration"), ("pre", yaml.safe_dump(settings, sort_keys=False))]


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    def show(key: str, form: Callable[[float], str]) -> str:
        return "n/a" if row[key] is None else form(row[key])

    interval = "n/a" if row["low"] is None else f"{row['low']:,.0f} to {row['high']:,.0f}"
    return (row["series"], str(row["processes"]), str(row["repeats"]), f"{row['tokens_per_second']:,.0f}", interval,
            f"{row['efficiency']:.0%}", str(row["base"]), f"{row['step_seconds']:.3g}", f"{row['data_wait_share']:.1%}",
            show("forward_backward_seconds", "{:.3g}".format), show("optimizer_seconds", "{:.3g}".format),
            show("mfu", "{:.1%}".format), show("hfu", "{:.1%}".format))


def _markdown(parts: Sequence[tuple[str, Any]]) -> str:
    lines = []
    for kind, value in parts:
        if kind == "table":
            head, *body = value
            clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *body)]
            clean.insert(1, ["---"] * len(head))
            lines.append("\n".join(f"| {' | '.join(row)} |" for row in clean))
        elif kind != "picture":
            lines.append({"h1": f"# {value}", "h2": f"## {value}", "pre": f"```yaml\n{value}```"}.get(kind, value))
    return "\n\n".join(lines) + "\n"


def _html(study: Study, parts: Sequence[tuple[str, Any]], png: bytes) -> str:
    body = []
    for kind, value in parts:
        if kind == "table":
            rows = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
                    for tag, row in zip(["th"] + ["td"] * len(value), value)]
            body.append("<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>")
        elif kind == "picture":
            body.append('<img alt="throughput, efficiency and step time over processes" src="data:image/png;base64,'
                        f'{base64.b64encode(png).decode()}">')
        else:
            body.append(f"<{kind}>{html.escape(value)}</{kind}>")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(study.file.name)}</title>'
            f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n")


def _picture(summary: Rows) -> bytes:
    """PNG: throughput with intervals, efficiency, and the parts of a step, over the number of processes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for series in dict.fromkeys(row["series"] for row in summary):
        rows = [row for row in summary if row["series"] == series]
        x, rates = [row["processes"] for row in rows], [row["tokens_per_second"] for row in rows]
        # a median of resampled repeats may lie on either side of nothing: the interval holds the median itself
        errors = [[max(0, rate - (row["low"] or rate)) for row, rate in zip(rows, rates)],
                  [max(0, (row["high"] or rate) - rate) for row, rate in zip(rows, rates)]]
        left.errorbar(x, rates, yerr=errors, marker="o", capsize=3, label=series)
        middle.plot(x, [100 * row["efficiency"] for row in rows], marker="o", label=series)
    names = [f"{row['series']}\n{row['processes']}" for row in summary]
    bottom = [0.0] * len(summary)
    for key in ("data_wait_seconds", "forward_backward_seconds", "optimizer_seconds"):
        values = [row[key] or 0.0 for row in summary]
        right.bar(range(len(names)), values, bottom=bottom, label=key.removesuffix("_seconds").replace("_", " "))
        bottom = [a + b for a, b in zip(bottom, values)]
    right.set_xticks(range(len(names)), names, fontsize="x-small", rotation=60)
    left.set(xlabel="processes", ylabel="throughput (tokens/s)", ylim=(0, None))
    middle.set(xlabel="processes", ylabel="efficiency (%)", ylim=(0, None))
    right.set(xlabel="series and processes", ylabel="time of a step (s)")
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()

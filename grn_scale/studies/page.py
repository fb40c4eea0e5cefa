"""A report as parts, and those as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:0 auto;padding:1.5em 1em 4em;color:#1c1c1c;
background:#fff}
h1{font-size:1.7em;line-height:1.2;margin:.2em 0 .6em}
h2{font-size:1.2em;margin:2em 0 .4em;padding-top:.6em;border-top:1px solid #ddd}
p{max-width:46em;margin:.6em 0}
ul{max-width:46em;padding-left:1.3em}
.wide{overflow-x:auto;margin:.8em 0}
table{border-collapse:collapse;font-size:.9em;line-height:1.35}
caption{text-align:left;font-weight:600;padding-bottom:.3em}
th,td{padding:.3em .7em;border-bottom:1px solid #e3e3e3;text-align:right;vertical-align:top;
font-variant-numeric:tabular-nums}
th{background:#f5f5f3;font-weight:600;vertical-align:bottom}
th.text,td.text{text-align:left}
td.text{overflow-wrap:anywhere;min-width:5em;max-width:34em}
.numbers td,td:first-child{white-space:nowrap}
figure{margin:1em 0}
figure img{max-width:100%;height:auto;display:block}
figcaption{font-size:.9em;color:#444;max-width:46em}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 1.5em}
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Items:
    """Short statements, one below the other."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """The first `words` columns hold words and stand left, the others numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    words: int = 1

    def worded(self, column: int) -> bool:
        return column < self.words

    def without_empty(self) -> Table:
        """Without the columns that hold nothing in any row."""
        kept = [column for column in range(len(self.head)) if any(row[column] != "" for row in self.rows)]
        return Table([self.head[column] for column in kept], [[row[column] for column in kept] for row in self.rows],
                     sum(map(self.worded, kept)))


@dataclass(frozen=True)
class Pictures:
    """Pictures beside each other: (data URI, caption). Markdown leaves them out."""

    pictures: Sequence[tuple[str, str]]


Part = Heading | Text | Items | Table | Pictures


def markdown(parts: Sequence[Part]) -> str:
    return "\n\n".join(block for part in parts if (block := _markdown(part))) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(items):
            return "\n".join(f"- {item}" for item in items)
        case Table(head, rows):
            rule = ["---" if part.worded(column) else "---:" for column in range(len(head))]
            clean = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in (clean[0], rule, *clean[1:]))
    return ""


def page(title: str, parts: Sequence[Part]) -> str:
    """One HTML document: no script, nothing loaded from elsewhere."""
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width,initial-scale=1">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n'
            "</head>\n<body>\n" + "\n".join(map(_html, parts)) + "\n</body>\n</html>\n")


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
        case Table(head, rows):
            lines = [_row("th", part, head), *(_row("td", part, row) for row in rows)]
            kind = " class=numbers" if part.words == 1 else ""
            return (f'<div class="wide"><table{kind}>\n<thead>{lines[0]}</thead>\n<tbody>\n' + "\n".join(lines[1:])
                    + "\n</tbody></table></div>")
        case Pictures(pictures):
            return ('<div class="pictures">' + "".join(
                f'<figure><img alt="{html.escape(caption)}" src="{source}"><figcaption>{html.escape(caption)}'
                "</figcaption></figure>" for source, caption in pictures) + "</div>")


def _row(tag: str, table: Table, cells: Sequence[Any]) -> str:
    return "<tr>" + "".join(
        f"<{tag}{' class=text' if table.worded(column) else ''}>{html.escape(str(cell))}</{tag}>"
        for column, cell in enumerate(cells)) + "</tr>"

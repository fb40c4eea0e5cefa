"""Slurm's short form of a list of nodes."""

from __future__ import annotations

import re

_ITEM = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")
_GROUP = re.compile(r"\[([^\]]*)\]")


def expand(nodes: str) -> list[str]:
    """node[1-2,07],x -> node1, node2, node07, x."""
    return [name for item in _ITEM.findall(nodes) for name in _names(item)]


def _names(item: str) -> list[str]:
    group = _GROUP.search(item)
    if group is None:
        return [item]
    numbers = []
    for part in group[1].split(","):
        first, _, last = part.partition("-")
        if not (first.isdigit() and (last or first).isdigit()):
            return [item]  # no form of Slurm's: shown as it is
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return [name for number in numbers for name in _names(item[:group.start()] + number + item[group.end():])]

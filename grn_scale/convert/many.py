"""Many conversions by many processes: `grn-scale convert --list FILE`, started as often and wherever one likes.

Each line of the file holds the arguments of one conversion, as they would stand behind `grn-scale convert`. Processes
share the work through claims in FILE.claims/. A conversion whose output is there is done: an output appears as a whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.atomic import intended_name, partial_name, remove_partial, write_bytes
from grn_scale.convert.convert import Request, convert, is_free
from grn_scale.errors import ConfigError, UserError
from grn_scale.leases import ClaimLost, Leases
from grn_scale.storage import LocalStorage

LEASE_SECONDS = 60.0
LOOK_SECONDS = 2.0
"""Between two looks at conversions that others are at."""

log = logging.getLogger("grn_scale")


@dataclass(frozen=True)
class Line:
    """One conversion."""

    number: int
    arguments: tuple[str, ...]
    request: Request

    @property
    def name(self) -> str:
        """Of its claim."""
        return hashlib.sha256(os.path.abspath(self.request.output).encode()).hexdigest()[:16]


def read_list(path: Path, request_of: Callable[[list[str]], Request]) -> list[Line]:
    """The conversions of a file; empty lines and lines that begin with # are left out. ConfigError naming the line
    that `request_of` (arguments -> Request) refuses, or that writes where another one does."""
    try:
        texts = path.read_text(encoding="utf-8").split("\n")  # names may hold the rest of what ends a line elsewhere
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list: cannot read {path}: {error}") from error
    lines: dict[str, Line] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        try:
            arguments = shlex.split(text)
            line = Line(number, tuple(arguments), request_of(arguments))
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        if line.name in lines:
            raise ConfigError(f"{path}:{number}: writes {line.request.output}, as line {lines[line.name].number} does; "
                              "give each its own output")
        lines[line.name] = line
    return list(lines.values())


@contextmanager
def _noted(note: Path, output: Path) -> Iterator[Path]:
    """Where this process writes the output before it is complete, noted for as long as it does. What is noted already
    is that of a process which was killed, or sleeps and has lost its claim: it goes."""
    if note.exists():
        name = note.read_text(encoding="utf-8")
        if intended_name(name) == output.name:
            remove_partial(output.with_name(name))
    partial = partial_name(output)
    write_bytes(note, partial.name.encode())
    try:
        yield partial
    finally:
        with suppress(FileNotFoundError):
            if note.read_text(encoding="utf-8") == partial.name:  # else that of the one who took over
                note.unlink()


def convert_listed(path: Path, lines: list[Line]) -> dict[str, Any]:
    """Make every output that is not there, together with other processes that do the same; how many are there now and
    how many this process made. UserError naming each line that failed, once all others are done."""
    made, failed = 0, {}
    claims = path.absolute().with_name(f"{path.name}.claims")
    for folder in ("begun", "made"):  # a job's script counts what is in the second
        (claims / folder).mkdir(parents=True, exist_ok=True)
    with Leases(LocalStorage(claims), LEASE_SECONDS) as leases:
        while left := [line for line in lines if line.number not in failed and is_free(line.request.output)]:
            begun = False
            for line in left:
                if not is_free(line.request.output) or not leases.claim(line.name):
                    continue
                begun = True
                try:
                    if is_free(line.request.output):
                        log.info("%s:%d: %s", path, line.number, line.request.output)
                        with _noted(claims / "begun" / line.name, line.request.output.absolute()) as partial:
                            convert(line.request, partial, lambda: leases.check(line.name))
                        write_bytes(claims / "made" / line.name, b"")
                        made += 1
                except ClaimLost:
                    log.warning("%s:%d: another process has taken it over", path, line.number)
                except UserError as error:
                    if not _still_holds(leases, line.name):  # and with the claim what was written went
                        continue
                    log.error("%s:%d: %s", path, line.number, error)
                    failed[line.number] = str(error)
                finally:
                    leases.release(line.name)
            if not begun:
                time.sleep(LOOK_SECONDS)
    if failed:
        raise UserError(f"{len(failed)} of {len(lines)} conversions failed: "
                        + "; ".join(f"{path}:{number}: {text}" for number, text in failed.items()))
    return {"list": str(path), "conversions": len(lines), "made_here": made}


def _still_holds(leases: Leases, name: str) -> bool:
    try:
        leases.check(name)
    except ClaimLost:
        return False
    return True

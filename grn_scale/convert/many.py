"""Many conversions by many processes: `grn-scale convert --list FILE`, started as often and wherever one likes.

Each line of the file holds the arguments of one conversion, as they would stand behind `grn-scale convert`. Processes
share the work through claims in FILE.claims/. A conversion whose output is there is done: an output appears as a whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.atomic import PARTIAL, write_bytes
from grn_scale.convert.convert import Request, convert
from grn_scale.errors import ConfigError, UserError
from grn_scale.leases import Leases
from grn_scale.storage import LocalStorage

LEASE_SECONDS = 60.0
LOOK_SECONDS = 2.0
"""Between two looks at conversions that others are at."""

log = logging.getLogger("grn_scale")


@dataclass(frozen=True)
class Line:
    """One conversion."""

    number: int
    request: Request

    @property
    def name(self) -> str:
        """Of its claim."""
        return hashlib.sha256(os.path.abspath(self.request.output).encode()).hexdigest()[:16]


def read_list(path: Path, request_of: Callable[[list[str]], Request]) -> list[Line]:
    """The conversions of a file; empty lines and lines that begin with # are left out. ConfigError naming the line
    that `request_of` (arguments -> Request) refuses, or that writes where another one does."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list: cannot read {path}: {error}") from error
    lines: dict[str, Line] = {}
    for number, text in enumerate(texts, 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        try:
            line = Line(number, request_of(shlex.split(text)))
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
        if line.name in lines:
            raise ConfigError(f"{path}:{number}: writes {line.request.output}, as line {lines[line.name].number} does; "
                              "give each its own output")
        lines[line.name] = line
    return list(lines.values())


@contextmanager
def _noted(note: Path, output: Path) -> Iterator[None]:
    """A note that this list works on an output, for as long as it does. One that is there already is that of a process
    which was killed: what it left beside the output goes. Where others left something, it stays, and is refused."""
    partial = output.with_name(output.name + PARTIAL)
    if note.exists() and partial.is_dir():
        shutil.rmtree(partial)  # this list's, by the note
    elif note.exists():
        partial.unlink(missing_ok=True)
    if not partial.exists():
        write_bytes(note, b"")
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def convert_listed(path: Path, lines: list[Line]) -> dict[str, Any]:
    """Make every output that is not there, together with other processes that do the same; how many are there now and
    how many this process made. UserError naming each line that failed, once all others are done."""
    made, failed = 0, {}
    claims = path.absolute().with_name(f"{path.name}.claims")
    for folder in ("begun", "made"):  # a job's script counts what is in the second
        (claims / folder).mkdir(parents=True, exist_ok=True)
    with Leases(LocalStorage(claims), LEASE_SECONDS) as leases:
        while left := [line for line in lines if line.number not in failed and not line.request.output.exists()]:
            begun = False
            for line in left:
                if line.request.output.exists() or not leases.claim(line.name):
                    continue
                begun = True
                try:
                    if not line.request.output.exists():
                        log.info("%s:%d: %s", path, line.number, line.request.output)
                        with _noted(claims / "begun" / line.name, line.request.output):
                            convert(line.request)
                        write_bytes(claims / "made" / line.name, b"")
                        made += 1
                except UserError as error:
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

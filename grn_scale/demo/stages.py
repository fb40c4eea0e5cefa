"""Commands run one after the other, each printed before it runs; a finished one is not run again.

    FOLDER/demo.json      what the folder was made with; marks it as ours
    FOLDER/stages.json    command and seconds of each finished stage
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_json
from grn_scale.config.load import changes
from grn_scale.errors import ConfigError, UserError

MARKER = "demo.json"
RECORDS = "stages.json"
ABOUT = "output of grn-scale demo"
SECONDS_TO_STOP = 30.0
"""Time a command has to end by itself after an interrupt."""


class StageFailed(UserError):
    """A command ended with an error; `exit_code` is its own."""

    def __init__(self, name: str, command: str, code: int) -> None:
        super().__init__(f"stage {name!r} failed with exit code {code}. Its command was\n  {command}\nWhat went wrong "
                         "stands above; run the demo again to go on from here, finished stages are kept")
        self.exit_code = code


class Stages:
    """The stages of one output folder. ConfigError or UserError where the folder is not ours, or was made otherwise.

    settings: plain values all stages' results depend on; a folder keeps those it was started with.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        _claim(folder, settings)
        self.records: dict[str, dict[str, Any]] = _read(folder / RECORDS) if (folder / RECORDS).is_file() else {}
        """Of finished stages by name: command, seconds."""
        self._later_ones_too = False

    def run(self, name: str, command: Sequence[str | Path], makes: Path, new_folder: Path | None = None) -> None:
        """Run `command` unless it has made `makes` before, from stages that have not been run again since.

        new_folder: a folder that the command wants to make itself; what an earlier run left there is renamed.
        Raises StageFailed where it fails, or does not leave `makes` behind.
        """
        command = [str(part) for part in command]
        line = shlex.join([_short(command[0]), *command[1:]])
        record = self.records.get(name)
        if record and record["command"] == command[1:] and makes.exists() and not self._later_ones_too:
            print(f"\n== {name}: finished before, in {record['seconds']:.1f} s\n# {line}", flush=True)
            return
        self._later_ones_too = True
        self._write({key: value for key, value in self.records.items() if key != name})
        if new_folder:
            _set_aside(new_folder)
        print(f"\n== {name}\n$ {line}", flush=True)
        begin = time.perf_counter()
        code = _call(command)
        seconds = time.perf_counter() - begin
        if code or not makes.exists():
            raise StageFailed(name, line, code or 1)
        print(f"== {name}: {seconds:.1f} s", flush=True)
        self._write({**self.records, name: {"command": command[1:], "seconds": round(seconds, 2)}})

    def _write(self, records: dict[str, dict[str, Any]]) -> None:
        self.records = records
        write_json(self.folder / RECORDS, records)


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    marker = folder / MARKER
    if not marker.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"--output: {folder} exists and was not made by `grn-scale demo`; give a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, {"about": ABOUT, "settings": settings})
        return
    there = _read(marker)
    if there.get("about") != ABOUT:
        raise ConfigError(f"--output: {folder} was not made by `grn-scale demo`; give a new folder")
    changed = changes(there.get("settings", {}), json.loads(json.dumps(settings)))
    if changed:
        listed = "; ".join(f"{key} {change}" for key, change in changed.items())
        raise ConfigError(f"--output: {folder} was made with other settings ({listed}); give a new folder, "
                          "or the settings as they were")


def _set_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (old := folder.with_name(f"{folder.name}.old{number}")).exists():
        number += 1
    folder.rename(old)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a new --output folder") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not what this command writes; give a new --output folder")
    return values


def _short(program: str) -> str:
    """The program's path, relative where it lies below the current folder (a virtual environment of the checkout)."""
    relative = os.path.relpath(program)
    return program if relative.startswith(os.pardir) else relative


def _call(command: Sequence[str]) -> int:
    """Exit code of the command, 128 + n where signal n ended it. It never outlives this process's own end.

    An interrupt from the keyboard reaches the command by itself; any other end is passed on to it.
    """
    def ended(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, ended)
    child = subprocess.Popen(command)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        _wait_or_kill(child)
        raise
    except SystemExit:
        child.terminate()
        _wait_or_kill(child)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 128 - code if code < 0 else code


def _wait_or_kill(child: subprocess.Popen) -> None:
    try:
        child.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()

"""What is looked at on every node before a job starts, one process a node:

    srun --ntasks-per-node=1 python -m grn_scale.slurm.preflight --records FOLDER --config FILE --gpus-per-node 8

Leaves FOLDER/NODE.json with all results, and FOLDER/NODE.ok beside it where nothing speaks against the node: then it is
fit, even if others are not. Exit code 0 where nothing failed at all.

The checks run in two processes, those of the network and those of files, so that a dead file system, a hanging driver
or a crash costs the rest of one of them. This one looks at neither, and ends them when the time is up.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import run
from grn_scale.errors import EXIT_FAILED, UserError
from grn_scale.slurm.preflight_check import FAILED, Node, Result, arguments

PROCESSES = {"network": "grn_scale.slurm.preflight_network", "files": "grn_scale.slurm.preflight_files"}
END_SHARE = 0.95
"""Of the time limit, when the processes are ended; what is left is for writing what was found."""
PIPE_BYTES = 1 << 16
KILLED_SECONDS = 0.2
STDERR = 2


def main(argv: list[str]) -> int:
    """Check this node; 0 where nothing failed, of other nodes neither."""
    parser = arguments("slurm preflight", "Look at this node before a job starts; one process a node.")
    options = parser.parse_options(argv)
    node, folder, begin = Node.of_step(), Path(options.records), time.monotonic()
    patience = (1 - END_SHARE) * options.seconds
    lost = _within(patience, lambda: _announce(folder, node))

    def say(result: Result) -> None:
        print(result.line(node.name), flush=True)

    commands = {name: [sys.executable, "-m", module, *argv] for name, module in PROCESSES.items()}
    results = watch(commands, END_SHARE * options.seconds - (time.monotonic() - begin), say)
    if not lost:
        lost = _within(patience, lambda: _conclude(folder, node, results))
    if lost:
        say(Result("records", FAILED, f"nothing can be written to {folder}: {lost}", 0.0))
    return EXIT_FAILED if lost or any(result.state == FAILED for result in results) else 0


def watch(commands: Mapping[str, Sequence[str]], seconds: float, say: Callable[[Result], None]) -> list[Result]:
    """Results of the processes (name -> command), also passed to `say` one by one.

    A process gets the option --pipe, see `tell_checks`. One that crashes, or does not end in time and is killed, is a
    failure of the check that it was at.
    """
    end, processes, results = time.monotonic() + seconds, [_Process(*item) for item in commands.items()], []

    def add(result: Result) -> None:
        results.append(result)
        say(result)

    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.pipe, selectors.EVENT_READ, process)
        while selector.get_map() and (left := end - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if not key.data.read(add):
                    selector.unregister(key.fileobj)
                    key.data.close(add)
        for key in list(selector.get_map().values()):
            key.data.kill(seconds, add)
    return results


class _Process:
    """One process with checks, and where it is."""

    def __init__(self, name: str, command: Sequence[str]):
        self.pipe, writes = os.pipe()
        try:
            # Of what libraries print nothing is a result.
            self._process = subprocess.Popen([*command, "--pipe", str(writes)], pass_fds=(writes,), stdout=STDERR,
                                             stdin=subprocess.DEVNULL)
        finally:
            os.close(writes)
        self._name, self._unread, self._check, self._since = name, b"", "", time.monotonic()

    def read(self, add: Callable[[Result], None]) -> bool:
        """Take in what it says; False at its end."""
        data = os.read(self.pipe, PIPE_BYTES)
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in map(json.loads, lines):
            if "begins" in line:
                self._check, self._since = line["begins"], time.monotonic()
            else:
                self._check = ""
                add(Result(**line))
        return bool(data)

    def close(self, add: Callable[[Result], None]) -> None:
        """It has said all: a failure where it did not end well."""
        os.close(self.pipe)
        code = self._process.wait()
        if code:
            add(self._failure(f"its process was ended by {signal.Signals(-code).name}" if code < 0 else
                              f"its process ended with exit code {code}", "what it said last stands in the job's log"))

    def kill(self, seconds: float, add: Callable[[Result], None]) -> None:
        """End it, if it can be ended: it may hang in the system for ever."""
        os.close(self.pipe)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_SECONDS)
        add(self._failure(f"did not end within the {seconds:.0f} s that all checks have together",
                          "a file system, driver or network of this node hangs"))

    def _failure(self, what: str, remedy: str) -> Result:
        return Result(self._check or f"{self._name} checks", FAILED, f"{what}; what comes after it was not looked at",
                      round(time.monotonic() - self._since, 3), remedy)


def _announce(folder: Path, node: Node) -> None:
    """Other nodes may see that this one has started."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{node.name}.ok").unlink(missing_ok=True)
    write_json(folder / f"{node.name}.json", _document(node, False, []))


def _conclude(folder: Path, node: Node, results: Sequence[Result]) -> None:
    fit = all(result.state != FAILED or (result.nodes and node.name not in result.nodes) for result in results)
    write_json(folder / f"{node.name}.json", _document(node, True, results, fit=fit))
    if fit:
        write_bytes(folder / f"{node.name}.ok", b"")


def _document(node: Node, finished: bool, results: Sequence[Result], fit: bool = False) -> dict[str, Any]:
    return {"node": node.name, "nodes": len(node.names), "time": round(time.time(), 3), "finished": finished,
            "fit": fit, "results": [asdict(result) for result in results]}


def _within(seconds: float, action: Callable[[], None]) -> str:
    """Run an action on files; what went wrong, empty where it is done in time. It may go on behind."""
    said = [f"no answer within {seconds:.0f} s"]

    def attempt() -> None:
        try:
            action()
            said[0] = ""
        except (OSError, UserError) as error:
            said[0] = str(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return said[0]


if __name__ == "__main__":
    sys.exit(run(main))

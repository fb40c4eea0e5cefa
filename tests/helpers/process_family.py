"""Starts commands and, when its input ends, ends each process that came of them: `python process_family.py FOLDER`.

A line of its input is a command: {"arguments": [...], "output": FILE}, where FILE takes what it prints. The input is a
pipe of the process that asked for the commands, so they end with that one however it ends, and FOLDER, which it made
for them, is removed. Daemons that leave their parent fall to this process (it is a "subreaper"), which therefore never
ends a process that is no child of its own.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def children() -> list[int]:
    """Process ids of the children of this process that were not waited for yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text(errors="replace").rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended since the listing
        if int(parent) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def wait_for_ended(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return  # no child at all


def main() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    signal.signal(signal.SIGCHLD, wait_for_ended)
    for line in sys.stdin:
        command = json.loads(line)
        with open(command["output"], "ab") as output:
            subprocess.Popen(command["arguments"], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                             start_new_session=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    while family := children():  # the children of those that end here are the next ones
        for process in family:
            os.kill(process, signal.SIGKILL)
        for process in family:
            os.waitpid(process, 0)
    shutil.rmtree(sys.argv[1])  # which the cluster made for itself


if __name__ == "__main__":
    main()

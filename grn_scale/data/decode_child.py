"""The parent's side of one decoding process: asks, waits no longer than allowed, tells what went wrong."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import grn_scale

START_SECONDS = 120.0
"""Time a child may take to import its decoders; slow shared file systems take long."""
KILL_SECONDS = 10.0
"""Time a killed child may take to go. One that waits for a dead file server cannot, and is left behind."""
READ_BYTES = 1 << 16
LONGEST_REPLY_BYTES = 1 << 20
MOST_BYTES_A_READ = 1 << 30
"""Linux reads at most 2 GiB at a time."""
MEGABYTE = 1 << 20
MEMORY_SIGNALS = frozenset((signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS))
"""How native code ends that does not check whether it got the memory it asked for."""


class ChildFailed(Exception):
    """The child gave no answer and must be closed; the text tells what happened."""


class ChildGone(ChildFailed):
    """The child ended by itself or was ended by others."""


class ChildLate(ChildFailed):
    """The child did not answer in time."""


class DecodeChild:
    """One child process. Not thread-safe: each is used by one thread at a time."""

    def __init__(self, timeout_seconds: float, memory_megabytes: int) -> None:
        self._timeout_seconds = timeout_seconds
        self._memory_megabytes = memory_megabytes
        # Nameless, so that nothing of it is left however the processes end.
        self._frames = os.memfd_create("frames") if hasattr(os, "memfd_create") else _unlinked_file()
        package_root = str(Path(grn_scale.__file__).resolve().parents[1])
        inherited = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(filter(None, (package_root, inherited)))}
        command = (sys.executable, "-m", "grn_scale.data.decode_worker", str(self._frames), str(timeout_seconds),
                   str(memory_megabytes))
        self.process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env=environment, pass_fds=(self._frames,))
        self._ending = threading.Lock()
        self._buffer = bytearray()
        self._number = 0
        self.ready = False
        """Whether the child has started up."""
        self.spent = False
        """Whether the child came near its memory limit and must be closed, though it answers."""
        self.out_of_memory = False
        """Set by `close`: whether the child died as native code does that gets no memory."""

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The reply to a request, and the frames if it has a clip; uint8, owned by the caller.

        Raises ChildFailed, after which the child must be closed.
        """
        if not self.ready:
            self._message(time.monotonic() + START_SECONDS)
            self.ready = True
        self._number += 1
        deadline = time.monotonic() + self._timeout_seconds
        try:
            self.process.stdin.write(json.dumps({**request, "number": self._number}).encode() + b"\n")
        except BrokenPipeError as error:
            raise ChildGone("it ended before it was asked") from error
        reply = self._message(deadline)
        if reply.get("number") != self._number:
            raise ChildFailed(f"it sent something that is no reply: {str(reply)[:80]!r}")
        self.spent = reply["spent"]
        return reply, self._read_frames(reply["shape"]) if "clip" in reply else None

    def _message(self, deadline: float) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > LONGEST_REPLY_BYTES:
                raise ChildFailed(f"it sent something that is no reply: {bytes(self._buffer[:80])!r}")
            self._buffer += self._read(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise ChildFailed(f"it sent something that is no reply: {line[:80]!r}") from error
        return message if isinstance(message, dict) else {}

    def _read(self, deadline: float) -> bytes:
        pipe = self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise ChildLate("it did not answer in time")
        data = os.read(pipe, READ_BYTES)
        if not data:
            raise ChildGone("it ended")
        return data

    def _read_frames(self, shape: list[int]) -> np.ndarray:
        size, have = math.prod(shape), 0
        if size > os.fstat(self._frames).st_size:
            raise ChildFailed(f"it left fewer frames than the {shape[0]} it told of")
        frames = np.empty(size, np.uint8)
        while have < size:
            have += os.preadv(self._frames, [frames[have : have + MOST_BYTES_A_READ]], have)
        return frames.reshape(shape)

    def kill(self) -> None:
        """End the child; another thread that waits for its reply gets ChildFailed."""
        with self._ending:
            if self.process.returncode is None:
                os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> int:
        """Kill the child, if it still runs; its exit status."""
        self.kill()
        peak_kilobytes = self._reap()
        # The limit counts address space, the peak the part of it that was used.
        self.out_of_memory = (-self.process.returncode in MEMORY_SIGNALS
                              and peak_kilobytes * 1024 > self._memory_megabytes * MEGABYTE / 2)
        self.process.stdin.close()
        self.process.stdout.close()
        os.close(self._frames)
        return self.process.returncode

    def _reap(self) -> int:
        """Wait for the killed child's end; the most memory it had resident, in KiB."""
        deadline = time.monotonic() + KILL_SECONDS
        with self._ending:
            while True:
                # Not through Popen, which does not tell the memory.
                pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
                if pid or time.monotonic() > deadline:
                    self.process.returncode = os.waitstatus_to_exitcode(status) if pid else -signal.SIGKILL
                    return usage.ru_maxrss
                time.sleep(0.002)


def _unlinked_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

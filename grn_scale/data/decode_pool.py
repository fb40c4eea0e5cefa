"""Decoding in child processes, so that a hang or a crash of a native decoder costs one clip and nothing else.

The children are fresh interpreters that load no torch. Each serves one request at a time over a pipe; a thread of
this process waits for its answer up to the time limit, then kills and replaces it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

import grn_scale
from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest
from grn_scale.errors import UserError

START_SECONDS = 120.0
"""Time a child may take to import its decoders; slow shared file systems take long."""
READ_BYTES = 1 << 20


class _Died(Exception):
    """The child closed its pipe."""


class _Late(Exception):
    """The child did not answer in time."""


class _Worker:
    """One child process. Not thread-safe: each is used by one thread at a time."""

    def __init__(self) -> None:
        package_root = str(Path(grn_scale.__file__).resolve().parents[1])
        inherited = os.environ.get("PYTHONPATH")
        environment = {**os.environ, "OMP_NUM_THREADS": "1",
                       "PYTHONPATH": os.pathsep.join(filter(None, (package_root, inherited)))}
        self.process = subprocess.Popen([sys.executable, "-m", "grn_scale.data.decode_worker"], bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._buffer = bytearray()
        self._ready = False

    def decode(self, request: DecodeRequest, timeout_seconds: float) -> DecodedClip | DecodeError:
        """The clip, or why there is none. Raises _Died or _Late, after which the worker must be closed."""
        if not self._ready:
            self._message(time.monotonic() + START_SECONDS)
            self._ready = True
        deadline = time.monotonic() + timeout_seconds
        try:
            self.process.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
        except BrokenPipeError as error:
            raise _Died from error
        message = self._message(deadline)
        if "reason" in message:
            return DecodeError(message["reason"], message["detail"])
        frames = np.empty(message["shape"], dtype=np.uint8)
        self._fill(frames.data.cast("B"), deadline)
        return DecodedClip(frames=frames, **message["clip"])

    @property
    def ready(self) -> bool:
        """Whether the child has started up."""
        return self._ready

    def _message(self, deadline: float) -> dict:
        while (end := self._buffer.find(b"\n")) < 0:
            self._buffer += self._read(READ_BYTES, deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[:end + 1]
        return json.loads(line)

    def _fill(self, out: memoryview, deadline: float) -> None:
        have = len(self._buffer)
        out[:have] = self._buffer
        self._buffer.clear()
        while have < len(out):
            part = self._read(min(READ_BYTES, len(out) - have), deadline)
            out[have:have + len(part)] = part
            have += len(part)

    def _read(self, most: int, deadline: float) -> bytes:
        pipe = self.process.stdout.fileno()
        waiting = select.poll()
        waiting.register(pipe, select.POLLIN)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise _Late
        data = os.read(pipe, most)
        if not data:
            raise _Died
        return data

    def close(self) -> int:
        """Kill the child, if it still runs; its exit status."""
        self.process.kill()
        status = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return status


class DecodePool:
    """Decodes requests in `processes` children, each within `timeout_seconds`. Use it as a context manager.

    Memory is bounded: at most 2 * processes clips are decoded ahead of the one that is handed out.
    """

    def __init__(self, processes: int, timeout_seconds: float) -> None:
        self.processes = processes
        self.timeout_seconds = timeout_seconds
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: set[_Worker] = set()
        for _ in range(processes):
            self._start()

    def worker_pids(self) -> list[int]:
        """Process ids of the children, for monitoring."""
        return [worker.process.pid for worker in list(self._workers)]

    def map(self, requests: Iterable[DecodeRequest]) -> Iterator[tuple[DecodeRequest, DecodedClip | DecodeError]]:
        """(request, clip or error) in the order of `requests`, which are read only as far ahead as needed.

        Raises UserError where the children cannot even start.
        """
        pending: deque = deque()
        try:
            for request in requests:
                pending.append((request, self._threads.submit(self._decode, request)))
                if len(pending) > 2 * self.processes:
                    request, future = pending.popleft()
                    yield request, future.result()
            while pending:
                request, future = pending.popleft()
                yield request, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """End the children and the threads. Clips still being decoded are given up."""
        for worker in list(self._workers):
            worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._workers:
            self._workers.pop().close()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        worker = _Worker()
        self._workers.add(worker)
        self._idle.put(worker)

    def _decode(self, request: DecodeRequest) -> DecodedClip | DecodeError:
        worker = self._idle.get()
        try:
            result = worker.decode(request, self.timeout_seconds)
        except BaseException as failure:  # a worker left in the middle of a reply must not be used again; raised again
            started = worker.ready
            status = worker.close()
            self._workers.discard(worker)
            self._start()
            if not isinstance(failure, (_Died, _Late)):
                raise
            if not started:
                raise UserError(f"a decoding process did not start (exit status {status}); `{sys.executable} -m "
                                "grn_scale.data.decode_worker` shows why, `grn-scale doctor` what is missing") from None
            if isinstance(failure, _Late):
                return DecodeError("timeout", f"{request.path}: not decoded within {self.timeout_seconds:g} s")
            return DecodeError("crashed", f"{request.path}: the decoding process ended with status {status}")
        self._idle.put(worker)
        return result

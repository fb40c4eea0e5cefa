"""Decoding in child processes, so that a hang or a crash of a native decoder costs one clip and nothing else.

The children are fresh interpreters that load no torch. Each serves one request at a time; a thread of this process
waits for its answer up to the time limit, then kills and replaces it.
"""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.decode import DecodedClip, DecodeError, DecodeRequest, Media, VideoInfo
from grn_scale.data.decode_child import ChildFailed, ChildGone, ChildLate, DecodeChild
from grn_scale.errors import UserError

ATTEMPTS = 3
"""Children that are given one request: one may be killed from outside, which says nothing about the clip, but one after
the other has another reason, as where one after the other does not start."""

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodePool:
    """Decodes in `processes` children, each within `timeout_seconds` a clip and `memory_megabytes` of address space.

    Use it as a context manager. Memory is bounded: at most 2 * processes clips are decoded ahead of the one that is
    handed out.
    """

    def __init__(self, processes: int, timeout_seconds: float, memory_megabytes: int = 4096) -> None:
        self.processes = processes
        self.timeout_seconds = timeout_seconds
        self.memory_megabytes = memory_megabytes
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        self._children: set[DecodeChild] = set()
        self._closing = False
        self._counting = threading.Lock()
        self.busy_seconds = 0.0
        """Time that children have spent on requests, in all of them together."""
        for _ in range(processes):
            self._start()

    @classmethod
    def of(cls, settings: TokenizeConfig) -> DecodePool:
        """The pool that a configuration's tokenize section describes."""
        return cls(settings.decode_processes, settings.decode_timeout_seconds, settings.decode_memory_megabytes)

    def worker_pids(self) -> list[int]:
        """Process ids of the children, for monitoring."""
        return [child.process.pid for child in list(self._children)]

    def map(self, requests: Iterable[DecodeRequest]) -> Iterator[tuple[DecodeRequest, DecodedClip | DecodeError]]:
        """(request, clip or error) in the order of `requests`, which are read only as far ahead as needed.

        Raises UserError where the children cannot even start.
        """
        return self._in_order(requests, self._decode)

    def probe(self, files: Iterable[str | Path | Media],
              ) -> Iterator[tuple[str | Path | Media, VideoInfo | DecodeError]]:
        """(file, facts or error) in the order of `files`, which are read only as far ahead as needed.

        Media names a member of a tar. Raises UserError where the children cannot even start.
        """
        return self._in_order(files, self._probe)

    def _in_order(self, items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[tuple[Item, Result]]:
        pending: deque = deque()
        try:
            for item in items:
                pending.append((item, self._threads.submit(work, item)))
                if len(pending) > 2 * self.processes:
                    item, future = pending.popleft()
                    yield item, future.result()
            while pending:
                item, future = pending.popleft()
                yield item, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def close(self) -> None:
        """End the children and the threads. Clips still being decoded are given up."""
        self._closing = True
        for child in list(self._children):
            child.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        while self._children:
            self._children.pop().close()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        child = DecodeChild(self.timeout_seconds, self.memory_megabytes)
        self._children.add(child)
        self._idle.put(child)

    def _replace(self, child: DecodeChild) -> int:
        """Close a child and start another, unless the pool ends; the exit status."""
        status = child.close()
        self._children.discard(child)
        if not self._closing:
            self._start()
        return status

    def _decode(self, request: DecodeRequest) -> DecodedClip | DecodeError:
        reply, frames = self._ask({"decode": dataclasses.asdict(request)}, request.media)
        return DecodedClip(frames=frames, **reply["clip"]) if "clip" in reply else self._error(reply, request.media)

    def _probe(self, file: str | Path | Media) -> VideoInfo | DecodeError:
        media = file if isinstance(file, Media) else Media(os.fspath(file))
        reply, _ = self._ask({"probe": dataclasses.asdict(media)}, media)
        return VideoInfo(**reply["info"]) if "info" in reply else self._error(reply, media)

    def _error(self, reply: dict[str, Any], media: Media) -> DecodeError:
        if reply["reason"] == "out_of_memory":
            reply["detail"] = (f"{media}: decoding takes more than the {self.memory_megabytes} MB of "
                               f"tokenize.decode_memory_megabytes ({reply['detail']})")
        return DecodeError(reply["reason"], reply["detail"])

    def _ask(self, question: dict[str, Any], media: Media) -> tuple[dict[str, Any], np.ndarray | None]:
        """A child's reply and the frames that come with it; where the child fails, the reason as a reply."""
        for attempt in range(1, ATTEMPTS + 1):
            if self._closing:
                return {"reason": "crashed", "detail": f"{media}: given up"}, None
            child = self._idle.get()
            began = time.monotonic()
            try:
                answer = child.ask(question)
            except ChildFailed as failure:
                status = self._replace(child)
                killed = isinstance(failure, ChildGone) and status == -signal.SIGKILL and not child.out_of_memory
                if child.ready and not (killed and attempt < ATTEMPTS):
                    return self._reason(child, failure, status, media), None
            except BaseException:  # a child left in the middle of a reply must not be asked again
                self._replace(child)
                raise
            else:
                if child.spent:
                    self._replace(child)
                else:
                    self._idle.put(child)
                return answer
            finally:
                with self._counting:
                    self.busy_seconds += time.monotonic() - began
        raise UserError(f"{ATTEMPTS} decoding processes in turn did not start (exit status {status}); "
                        f"`{sys.executable} -m grn_scale.data.decode_worker 1 60 {self.memory_megabytes} < /dev/null` "
                        "shows why, `grn-scale doctor` what is missing")

    def _reason(self, child: DecodeChild, failure: ChildFailed, status: int, media: Media) -> dict[str, str]:
        if isinstance(failure, ChildLate):
            return {"reason": "timeout", "detail": f"{media}: not decoded within {self.timeout_seconds:g} s"}
        if child.out_of_memory:
            return {"reason": "out_of_memory", "detail": f"native code ended with status {status}"}
        hint = "; killed from outside, perhaps because the machine or the job ran out of memory"
        return {"reason": "crashed", "detail": f"{media}: the decoding process failed: {failure}; exit status {status}"
                                               f"{hint if status == -signal.SIGKILL else ''}"}

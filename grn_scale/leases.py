"""Who works on what: claims of named pieces of work, kept as files that their holders keep renewing.

Any number of processes on any number of machines share the work through a folder, on a local disk, NFS or object
storage. A claim saves work, it does not guard it: finished pieces are files that appear whole and whose bytes depend on
the piece and the environment alone, so two holders of one claim do the same twice and nothing else. That is what makes
it safe where clocks differ, a machine stalls, or a store has no exclusive creation.

A claim is free again when its holder gives it back, when its process is known to be gone (same machine), or when its
file has stayed the same for `seconds` by the clock of the one who looks. No two clocks are compared. A process that
slept for longer finds the claim of another in the file: it neither renews nor removes that one, and `check` says so.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType

from grn_scale.errors import UserError
from grn_scale.storage import PASSING, Storage

log = logging.getLogger(__name__)

FOLDER = "leases/"
RENEWALS = 4
"""Renewals in the time after which a claim counts as left behind."""


class ClaimLost(Exception):
    """Another process holds the claim now, or held it and is done: what was made under it here is to be dropped."""


class Leases:
    """The claims of one process; use it as a context manager. Claims still held at its end are given back."""

    def __init__(self, storage: Storage, seconds: float) -> None:
        """seconds: a claim that has not been renewed for so long may be taken by others."""
        self._storage = storage
        self._seconds = seconds
        self._holder = {"owner": uuid.uuid4().hex, "host": socket.gethostname(), "processes": _process_table(),
                        "pid": os.getpid(), "process_start": _process_start(os.getpid())}
        self._beat = 0
        self._held: set[str] = set()
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="renew-leases", daemon=True)

    def __enter__(self) -> Leases:
        self._renewer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop.set()
        self._renewer.join()
        for name in list(self._held):
            self.release(name)

    def claim(self, name: str) -> bool:
        """Whether the piece of work called `name` is now this process's. False too where the storage has a fault that
        may pass. OSError or UserError where no claim can be made: no right to write there, a full disk."""
        if name in self._held:
            return False
        path = FOLDER + name
        try:
            if self._storage.exists(path):  # much cheaper than to try a creation that fails
                if not self._left_behind(name, self._storage.read(path)):
                    return False
                log.info("taking over the claim of %s, which was left behind", name)
                self._storage.write_bytes(path, self._claim())
            elif not self._storage.create(path, self._claim()):
                return False
        except FileNotFoundError:
            return False  # given back while we looked
        except OSError as error:
            # Of a fault that may pass, the storage has warned at each of its attempts; the next look tells.
            if error.errno is not None and error.errno not in PASSING:
                raise
            return False
        with self._lock:
            self._held.add(name)
        self._seen.pop(name, None)
        return True

    def check(self, name: str) -> None:
        """ClaimLost unless the claim is still this process's. OSError where that cannot be seen."""
        if name not in self._held or not self._is_own(name):
            raise ClaimLost(name)

    def release(self, name: str) -> None:
        """Give a claim back, at the end of the work or before; nothing happens where it is another's by now."""
        with self._lock:
            if name in self._held:
                self._held.remove(name)
                if self._is_own(name):
                    self._storage.delete(FOLDER + name)

    def claimed(self) -> set[str]:
        """Names claimed by anybody, also those left behind."""
        return {name.removeprefix(FOLDER) for name in self._storage.names(FOLDER)}

    def _claim(self) -> bytes:
        self._beat += 1
        return json.dumps({**self._holder, "beat": self._beat}).encode()

    def _is_own(self, name: str) -> bool:
        """Whether the file of a claim is there and names this process. OSError where it cannot be read."""
        try:
            return json.loads(self._storage.read(FOLDER + name))["owner"] == self._holder["owner"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            log.debug("%s%s: %r", FOLDER, name, error)  # another release's, or damaged: not what this one wrote
            return False

    def _left_behind(self, name: str, current: bytes) -> bool:
        """Whether the holder of a claim with this content is gone."""
        try:
            holder = json.loads(current)
            if holder["owner"] == self._holder["owner"]:
                return True  # made, or not removed, in an attempt that was answered with a fault
            if holder["processes"] == self._holder["processes"]:
                return _process_start(holder["pid"]) != holder["process_start"]
        except (ValueError, KeyError, TypeError) as error:
            # Left by another release, or cut off by a store that is not atomic: it is not renewed, and so expires.
            log.warning("the claim %s%s cannot be read (%r)", FOLDER, name, error)
        before, since = self._seen.get(name, (None, 0.0))
        if before != current:
            self._seen[name] = (current, time.monotonic())
            return False
        return time.monotonic() - since > self._seconds

    def _renew(self) -> None:
        while not self._stop.wait(self._seconds / RENEWALS):
            with self._lock:
                for name in list(self._held):
                    try:
                        # After a long sleep the claim may be another's. Between the look and the write that may still
                        # happen: then the other one finds that it has lost it, and one of the two goes on.
                        if self._is_own(name):
                            self._storage.write_bytes(FOLDER + name, self._claim())
                        else:
                            log.warning("the claim of %s is another process's by now", name)
                            self._held.remove(name)
                    except (OSError, UserError) as error:  # a full disk too: the claim may be lost, the work is not
                        log.warning("cannot renew the claim of %s: %s", name, error)


def _process_table() -> str:
    """Names the table that process ids of this process refer to: a boot of a machine and a container on it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _process_start(pid: int) -> str:
    """Start time of a process of this machine in clock ticks; "" where there is none (or no /proc)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""

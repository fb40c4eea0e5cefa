"""One job at a time trains into a run folder.

A job that is started again while the former one still ends, or hangs, would save into the same checkpoint folders. The
lock is the operating system's, so it goes with the process that holds it, however that ends; file systems that many
nodes share (NFS 4, Lustre with flock, GPFS) pass it on to each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from grn_scale.errors import UserError

FILE_NAME = "run.lock"
PATIENCE_SECONDS = 60.0
"""How long a job waits for the one before it to end."""
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

log = logging.getLogger("grn_scale.train")


@contextlib.contextmanager
def run_lock(folder: Path, patience: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Hold the run folder, which is made where it is not there; one process of the job does.

    UserError where another job holds it for longer than `patience` seconds. A file system that has no locks is told of,
    and the run goes on.
    """
    path, end, told, new = folder / FILE_NAME, time.monotonic() + patience, False, not folder.exists()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # by process, not by open file: processes that this one forks do not keep it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_there(path, file):
                break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > end:
                holder = _holder(file)
                os.close(file)
                raise UserError(f"{folder} is in use by another job ({holder}): stop that one first (scancel, kill), "
                                "or give another output folder") from None
            if not told:
                log.warning("%s is in use by another job (%s): waiting up to %.0f s for its end", folder, _holder(file),
                            patience)
                told = True
            time.sleep(min(1.0, patience))
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(file)
                raise
            log.warning("%s: this file system has no locks (%s), so nothing notices a second job in the same folder",
                        path, error.strerror)
            break
        os.close(file)
    try:
        os.truncate(file, 0)
        os.pwrite(file, json.dumps(_this_job()).encode(), 0)
        yield
    finally:
        # before it is let go: whoever waits sees that the file is no longer there, and makes a new one
        path.unlink(missing_ok=True)
        os.close(file)
        if new:
            with contextlib.suppress(OSError):  # a start that was refused leaves nothing; a run leaves its files
                folder.rmdir()


def _is_there(path: Path, file: int) -> bool:
    """Whether the path still means the open file, and not one that its holder has removed."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _this_job() -> dict[str, str | int]:
    job = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    return {"host": socket.gethostname(), "pid": os.getpid(), **job, "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(file: int) -> str:
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items())
    except (OSError, ValueError, AttributeError):
        return "it has not said which"

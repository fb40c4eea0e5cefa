"""The few file operations a dataset needs, on a local folder or below an fsspec URL (s3://bucket/tokens).

Names are relative to the folder, with slashes. Whatever goes wrong on the way to a remote file is an OSError, as it
is for local ones. Faults that may pass are retried here, so callers need not: an OSError is what stayed.

Every URL that fsspec knows can be read. Written to are object stores only: there a file appears whole and at once, in
the place of the old one, and is created for one of several writers. File servers (sftp://, hdfs://) promise neither.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from grn_scale.atomic import DISK_FULL, PARTIAL, atomic_file, write_bytes
from grn_scale.errors import ConfigError, UserError

T = TypeVar("T")
log = logging.getLogger(__name__)

RETRY_SECONDS = (0.1, 1.0, 5.0)
"""Mean pauses before the further attempts: one hiccup of shared storage must not end a run of many processes."""
PASSING = frozenset((
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE,
    errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTUNREACH,
    errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET))
"""What NFS, Lustre and networks report when a server is slow, restarts or throttles."""
OBJECT_STORES = frozenset(("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"))
"""Protocols that may be written to. Their exclusive creation is one conditional request. A server of the S3 protocol
that does not know the condition overwrites instead, and several writers are told that they were first."""
_PACKAGES = {"s3": "grn-scale[s3]", "s3a": "grn-scale[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs",
             "abfss": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "http": "aiohttp",
             "https": "aiohttp"}
_NUMBERS = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES,
            NotADirectoryError: errno.ENOTDIR, IsADirectoryError: errno.EISDIR, TimeoutError: errno.ETIMEDOUT}


def retried(where: str, operation: Callable[[], T]) -> T:
    """What `operation` returns. It is called again, four times in all, after a fault that may pass.

    operation: may have taken effect although it failed, so it must bear being repeated. where: the file, for the log.
    Raises the last OSError of a fault that stayed, and any other error at once.
    """
    for pause in RETRY_SECONDS:
        try:
            return operation()
        except OSError as error:
            if not _may_pass(error):
                raise
            pause *= _spread(where)
            log.warning("%s: trying again in %.1f s: %s", where, pause, error)
        time.sleep(pause)
    return operation()


def _spread(where: str) -> float:
    """From 0.5 to 1.5: thousands of processes meet a fault at the same time, and should not come back at once."""
    return 0.5 + zlib.crc32(f"{socket.gethostname()} {os.getpid()} {where}".encode(errors="replace")) / 2**32


def _may_pass(error: OSError) -> bool:
    # An error without a number stands for one of a client, and few of those are known.
    return error.errno is None or error.errno in PASSING


class Storage(ABC):
    """A folder of files; several threads may use it, and it may be sent to another process."""

    location: str
    """The folder as it was given."""

    @staticmethod
    def of(folder: str | Path | Storage) -> Storage:
        """The storage behind a path or URL. Looks at no file.

        ConfigError for a URL whose protocol is unknown or not installed, UserError where its client cannot start.
        """
        if isinstance(folder, Storage):
            return folder
        protocol, separator, path = str(folder).partition("://")
        if not separator:
            return LocalStorage(Path(folder))
        return LocalStorage(Path(path)) if protocol in ("file", "local") else RemoteStorage(str(folder))

    @staticmethod
    def of_file(path: str | Path) -> tuple[Storage, str]:
        """The storage of the folder that a file lies in, and the file's name there."""
        if isinstance(path, Path) or "://" not in path:
            return LocalStorage(Path(path).parent), Path(path).name
        folder, _, name = path.rpartition("/")
        return Storage.of(folder), name

    def __reduce__(self) -> tuple:
        # Connections do not travel: another process makes its own.
        return Storage.of, (self.location,)

    def __truediv__(self, name: str) -> str:
        """Where a file is, for messages."""
        return f"{self.location.rstrip('/')}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The whole file. OSError (FileNotFoundError) where it cannot be read."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer where the file ends. OSError where it cannot be read."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file. FileNotFoundError where there is none."""

    @abstractmethod
    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and bytes of every file that `names` gives, from one listing."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """Sorted names of the files that start with `prefix`, which may name a folder ("index/", "chunks/video-").

        Files in folders below that one are not among them. Empty where the folder does not exist.
        """

    @abstractmethod
    def write(self, name: str) -> Any:
        """Context manager of a binary stream; the file appears when the block ends, and not at all after an error.

        Sending a whole file is retried; what is written to the stream is not, and a failing disk ends the block.
        UserError where the disk is full, ConfigError where nothing may be written, OSError otherwise.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False where one with other data does.

        Of several writers with different data one gets True. Writers whose data are equal may all get it: an answer may
        get lost, and then the data tell whose file it is. After an OSError it may be there or not.
        """
        try:
            retried(self / name, lambda: self._create(name, data))
        except FileExistsError:
            try:
                return self.read(name) == data
            except FileNotFoundError:
                return False  # removed since
        return True

    @abstractmethod
    def _create(self, name: str, data: bytes) -> None:
        """One attempt at `create`. FileExistsError where there is a file."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.size(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def write_bytes(self, name: str, data: bytes) -> None:
        """`data` as the whole file, atomically."""
        with self.write(name) as stream:
            stream.write(data)


class LocalStorage(Storage):
    """A folder of this machine, or of a file system mounted on it. It and folders in it are made when written to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.location = str(folder)

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        return retried(self / name, lambda: self.path(name).read_bytes())

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        def read() -> bytes:
            with open(self.path(name), "rb", buffering=0) as file:
                file.seek(offset)
                found = bytearray()
                while len(found) < length and (data := file.read(length - len(found))):
                    found += data
            return bytes(found)

        return retried(self / name, read)

    def size(self, name: str) -> int:
        return retried(self / name, lambda: self.path(name).stat().st_size)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        def look() -> dict[str, int]:
            found = {}
            for name, entry in self._entries(prefix):
                try:
                    found[name] = entry.stat().st_size
                except FileNotFoundError:  # renamed or removed by its writer since it was listed
                    continue
            return dict(sorted(found.items()))

        return retried(self / prefix, look)

    def names(self, prefix: str = "") -> list[str]:
        return retried(self / prefix, lambda: sorted(name for name, _ in self._entries(prefix)))

    def _entries(self, prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
        folder, slash, start = prefix.rpartition("/")
        try:
            with os.scandir(self.path(folder)) as entries:
                for entry in entries:
                    if entry.name.startswith(start) and entry.is_file():
                        yield folder + slash + entry.name, entry
        except FileNotFoundError:
            return

    def write(self, name: str) -> Any:
        retried(self / name, lambda: self._make_parent(name))
        return atomic_file(self.path(name))

    def write_bytes(self, name: str, data: bytes) -> None:
        def write() -> None:
            self._make_parent(name)
            write_bytes(self.path(name), data)

        retried(self / name, write)

    def _create(self, name: str, data: bytes) -> None:
        # A link, unlike an exclusive open, brings the content with it, and NFS carries it out once.
        self._make_parent(name)
        path = self.path(name)
        whole = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
        try:
            with whole.open("xb") as stream:  # readable by others, as far as the user's umask lets it
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(whole, path)
        finally:
            whole.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        retried(self / name, lambda: self.path(name).unlink(missing_ok=True))

    def _make_parent(self, name: str) -> None:
        self.path(name).parent.mkdir(parents=True, exist_ok=True)


class RemoteStorage(Storage):
    """Files below an fsspec URL. Its credentials and options are those that fsspec finds for the protocol."""

    def __init__(self, url: str):
        import fsspec
        from fsspec.dircache import DirCache

        self.location = url
        self._protocol = url.partition("://")[0]
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            package = _PACKAGES.get(self._protocol)
            remedy = f"pip install '{package}'" if package else "correct the URL, or install the package that it names"
            raise ConfigError(f"{url} cannot be opened: {error}; {remedy}") from error
        except Exception as error:  # some clients connect at once, and each has errors of its own
            raise UserError(f"{url} cannot be opened: {error!r}; see to the server, the address and the "
                            "credentials") from error
        # Other processes write files too: a listing that is kept would hide them, even from those who read by name.
        self._files.dircache = DirCache(use_listings_cache=False)
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        return self._ask("read", name, lambda path: self._files.cat_file(path))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""  # of which some clients make a request for the whole file

        def read(path: str) -> bytes:
            try:
                return self._files.cat_file(path, start=offset, end=offset + length)
            except OSError as error:
                # S3 refuses a range that begins behind the end.
                if error.errno == errno.EINVAL and self._files.size(path) <= offset:
                    return b""
                raise

        return self._ask("read", name, read)

    def size(self, name: str) -> int:
        return self._ask("look at", name, lambda path: int(self._files.size(path)))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        folder, slash, _ = prefix.rpartition("/")
        try:
            entries = self._ask("list", folder, lambda path: self._files.ls(path, detail=True))
        except FileNotFoundError:
            return {}
        files = ((folder + slash + entry["name"].rstrip("/").rpartition("/")[2], int(entry["size"]))
                 for entry in entries if entry["type"] == "file")
        return dict(sorted((name, size) for name, size in files if name.startswith(prefix)))

    def names(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        # The whole file lies on the local disk before any of it is sent.
        self._check_writable()
        try:
            with tempfile.NamedTemporaryFile(prefix="grn-upload-") as spool:
                yield spool
                spool.flush()
                self._ask("write", name, lambda path: self._files.put_file(spool.name, path))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise UserError(f"cannot write {self / name}: {DISK_FULL[error.errno]} in {tempfile.gettempdir()}, "
                                "where it is put together; set TMPDIR to a folder with more space, then run the same "
                                "command again") from error
            raise

    def _create(self, name: str, data: bytes) -> None:
        self._check_writable()
        try:
            with self._as_os_error("write", name):
                self._files.pipe_file(self._path(name), data, mode="create")
        except OSError as error:
            # Some servers of the S3 protocol do not say which condition it was that did not hold.
            if error.errno == errno.EINVAL and self.exists(name):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self / name) from error
            raise

    def delete(self, name: str) -> None:
        try:
            self._ask("remove", name, self._files.rm_file)
        except FileNotFoundError:
            return

    def _check_writable(self) -> None:
        if self._protocol not in OBJECT_STORES:
            raise ConfigError(f"{self.location} can be read but not written to: with {self._protocol}:// others may "
                              "see files half written; mount it as a folder, or give a URL of s3://, gs:// or abfs://")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, action: str, name: str, operation: Callable[[str], T]) -> T:
        """What `operation` returns for the client's path of a file, retried."""
        def ask() -> T:
            with self._as_os_error(action, name):
                return operation(self._path(name))

        return retried(self / name, ask)

    @contextmanager
    def _as_os_error(self, action: str, name: str) -> Iterator[None]:
        """Name the file in whatever a client raises. Kinds of OSError stay; for others there is an OSError without a
        number."""
        try:
            yield
        except Exception as error:  # each client has errors of its own; the cause is kept
            if isinstance(error, OSError):
                number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), None)
                if error.filename is None and number in errno.errorcode:
                    said = error.strerror or f"{os.strerror(number)} ({error})"
                    raise OSError(number, said, self / name) from error
                if error.filename is not None:
                    raise
            raise OSError(f"cannot {action} {self / name}: {error!r}") from error

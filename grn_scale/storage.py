"""The few file operations a dataset needs, on a local folder or below an fsspec URL (s3://bucket/tokens).

Names are relative to the folder, with slashes. Whatever goes wrong on the way to a remote file is an OSError, as it
is for local ones, so that callers retry both alike.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from grn_scale.atomic import DISK_FULL, PARTIAL, atomic_file
from grn_scale.errors import UserError


class Storage(ABC):
    """A folder of files; several threads may use it, and it may be sent to another process."""

    location: str
    """The folder as it was given."""

    @staticmethod
    def of(folder: str | Path | Storage) -> Storage:
        """The storage behind a path or URL. Looks at no file. UserError for a URL whose protocol is not installed."""
        if isinstance(folder, Storage):
            return folder
        protocol, separator, path = str(folder).partition("://")
        if not separator:
            return LocalStorage(Path(folder))
        return LocalStorage(Path(path)) if protocol == "file" else RemoteStorage(str(folder))

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

        UserError where the disk is full, OSError otherwise.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file that must not exist yet; False where it does. Of several writers one gets True.

        After an OSError it may be there or not: read it to see whose it is.
        """

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
        return self.path(name).read_bytes()

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with open(self.path(name), "rb", buffering=0) as file:
            file.seek(offset)
            found = bytearray()
            while len(found) < length and (data := file.read(length - len(found))):
                found += data
        return bytes(found)

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def sizes(self, prefix: str = "") -> dict[str, int]:
        found = {}
        for name, entry in self._entries(prefix):
            try:
                found[name] = entry.stat().st_size
            except FileNotFoundError:  # renamed or removed by its writer since it was listed
                continue
        return dict(sorted(found.items()))

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name, _ in self._entries(prefix))

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
        self.path(name).parent.mkdir(parents=True, exist_ok=True)
        return atomic_file(self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        # A link, unlike an exclusive open, brings the content with it, and NFS carries it out once.
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f"{path.name}.", suffix=PARTIAL, dir=path.parent) as whole:
            whole.write(data)
            whole.flush()
            os.fsync(whole.fileno())
            try:
                os.link(whole.name, path)
            except FileExistsError:
                # The answer of an NFS server may get lost: the second request then finds the link of the first.
                return os.stat(whole.name).st_nlink > 1
        return True

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)


class RemoteStorage(Storage):
    """Files below an fsspec URL. Its credentials and options are those that fsspec finds for the protocol."""

    def __init__(self, url: str):
        import fsspec

        self.location = url
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}; install the package that fsspec needs for this "
                            "protocol (s3fs for s3://, gcsfs for gs://), or correct the URL") from error
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        with self._as_os_error("read", name):
            return self._files.cat_file(self._path(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        with self._as_os_error("read", name):
            return self._files.cat_file(self._path(name), start=offset, end=offset + length)

    def size(self, name: str) -> int:
        with self._as_os_error("look at", name):
            self._files.invalidate_cache(self._path(name))
            return int(self._files.size(self._path(name)))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        folder, slash, _ = prefix.rpartition("/")
        found = {}
        with self._as_os_error("list", folder):
            path = self._path(folder)
            self._files.invalidate_cache(path)
            try:
                entries = self._files.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            for entry in entries:
                name = folder + slash + entry["name"].rstrip("/").rpartition("/")[2]
                if entry["type"] == "file" and name.startswith(prefix):
                    found[name] = int(entry["size"])
        return dict(sorted(found.items()))

    def names(self, prefix: str = "") -> list[str]:
        return list(self.sizes(prefix))

    @contextmanager
    def write(self, name: str) -> Iterator[BinaryIO]:
        # The whole file lies on the local disk before any of it is sent.
        try:
            with tempfile.NamedTemporaryFile(prefix="grn-upload-") as spool:
                yield spool
                spool.flush()
                with self._as_os_error("write", name):
                    self._files.put_file(spool.name, self._path(name))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise UserError(f"cannot write {self / name}: {DISK_FULL[error.errno]} in {tempfile.gettempdir()}, "
                                "where it is put together; set TMPDIR to a folder with more space, then run the same "
                                "command again") from error
            raise

    def create(self, name: str, data: bytes) -> bool:
        with self._as_os_error("write", name):
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def delete(self, name: str) -> None:
        with self._as_os_error("remove", name):
            try:
                self._files.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextmanager
    def _as_os_error(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # each client has errors of its own; the cause is kept
            raise OSError(f"cannot {action} {self / name}: {error!r}") from error

"""Faults of shared storage that pass, and those that stay."""

from __future__ import annotations

import errno
import logging
import os

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from grn_scale import storage as storage_module
from grn_scale.leases import FOLDER, Leases
from grn_scale.storage import LocalStorage, RemoteStorage, Storage, retried

PASSING = [errno.ESTALE, errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ECONNRESET]
STAYING = [errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR]


class Faults:
    """The next operations fail with the errors of `before`, and later ones of `after`, when they have had effect."""

    def __init__(self):
        self.before: list[Exception] = []
        self.after: list[Exception] = []

    def around(self, operation):
        if self.before:
            raise self.before.pop(0)
        result = operation()
        if self.after:
            raise self.after.pop(0)
        return result


class FaultyFolder(LocalStorage):
    faults: Faults

    def path(self, name):
        return self.faults.around(lambda: super(FaultyFolder, self).path(name))

    def _create(self, name, data):
        after, self.faults.after = self.faults.after, []
        super()._create(name, data)
        self.faults.after = after
        self.faults.around(lambda: None)


class FaultyStore(MemoryFileSystem):
    protocol = "faulty"
    store: dict = {}
    pseudo_dirs = [""]
    faults: Faults

    def cat_file(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).cat_file(*args, **options))

    def put_file(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).put_file(*args, **options))

    def pipe_file(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).pipe_file(*args, **options))

    def rm_file(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).rm_file(*args, **options))

    def ls(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).ls(*args, **options))

    def size(self, *args, **options):
        return self.faults.around(lambda: super(FaultyStore, self).size(*args, **options))


@pytest.fixture
def faults(monkeypatch) -> Faults:
    made = Faults()
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(storage_module, "OBJECT_STORES", {"faulty"})
    monkeypatch.setattr(FaultyStore, "store", {})
    monkeypatch.setattr(FaultyStore, "pseudo_dirs", [""])
    monkeypatch.setattr(FaultyStore, "faults", made, raising=False)
    monkeypatch.setattr(FaultyFolder, "faults", made, raising=False)
    fsspec.register_implementation("faulty", FaultyStore, clobber=True)
    return made


@pytest.fixture(params=["folder", "url"])
def storage(request, tmp_path, faults) -> Storage:
    return FaultyFolder(tmp_path) if request.param == "folder" else RemoteStorage("faulty://bucket/tokens")


OPERATIONS = {
    "read": lambda storage: storage.read("a") == b"12",
    "read_range": lambda storage: storage.read_range("a", 1, 1) == b"2",
    "size": lambda storage: storage.size("a") == 2,
    "exists": lambda storage: storage.exists("a"),
    "sizes": lambda storage: storage.sizes() == {"a": 2},
    "names": lambda storage: storage.names() == ["a"],
    "write_bytes": lambda storage: storage.write_bytes("a", b"12") is None,
    "create": lambda storage: storage.create("b", b"3"),
    "delete": lambda storage: storage.delete("a") is None,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_bears_faults_that_pass(storage, faults, caplog, name):
    storage.write_bytes("a", b"12")
    faults.before[:] = [OSError(number, os.strerror(number)) for number in (errno.ESTALE, errno.EIO, errno.ECONNRESET)]
    assert OPERATIONS[name](storage) and not faults.before
    assert sum(record.levelno == logging.WARNING and "trying again" in record.message
               for record in caplog.records) == 3


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_that_does_not_pass_is_raised_with_its_number(storage, faults, name):
    storage.write_bytes("a", b"12")
    faults.before[:] = [OSError(errno.EIO, "broken") for _ in range(4)]
    with pytest.raises(OSError, match="broken") as caught:
        OPERATIONS[name](storage)
    assert caught.value.errno == errno.EIO and not faults.before


@pytest.mark.parametrize("number", PASSING)
def test_faults_of_servers_and_networks_are_retried(number, monkeypatch):
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", (0.0,))
    answers = [OSError(number, os.strerror(number)), None]
    assert retried("a", lambda: raise_or_return(answers.pop(0))) is None and not answers


@pytest.mark.parametrize("number", STAYING + [errno.ENOSPC, errno.EDQUOT])
def test_what_another_attempt_cannot_mend_is_not_retried(number):
    answers = [OSError(number, os.strerror(number)), None]
    with pytest.raises(OSError):
        retried("a", lambda: raise_or_return(answers.pop(0)))
    assert answers == [None]


def raise_or_return(answer):
    if answer is not None:
        raise answer
    return answer


def test_the_pauses_grow_and_differ_between_files(monkeypatch):
    pauses = []
    monkeypatch.setattr(storage_module.time, "sleep", pauses.append)
    for where in ("a", "b"):
        with pytest.raises(OSError):
            retried(where, lambda: raise_or_return(OSError(errno.ESTALE, "stale")))
    assert sorted(pauses[:3]) == pauses[:3] and pauses[:3] != pauses[3:]
    for pause, mean in zip(pauses, storage_module.RETRY_SECONDS * 2):
        assert mean / 2 <= pause < mean * 1.5


def test_a_file_whose_creation_was_answered_with_a_fault_is_ours(storage, faults):
    faults.after[:] = [TimeoutError(errno.ETIMEDOUT, "no answer")]
    assert storage.create("a", b"mine") and not faults.after
    assert storage.read("a") == b"mine" and storage.names() == ["a"]


def test_a_file_that_another_created_in_between_is_not_ours(storage, faults):
    storage.write_bytes("a", b"theirs")
    faults.before[:] = [TimeoutError(errno.ETIMEDOUT, "no answer")]
    assert not storage.create("a", b"mine") and storage.read("a") == b"theirs"


def test_an_upload_is_sent_again_and_its_block_runs_once(faults):
    storage, runs = RemoteStorage("faulty://bucket/tokens"), []
    faults.before[:] = [OSError(errno.EBUSY, "SlowDown")]
    with storage.write("a") as stream:
        runs.append(stream.write(b"12"))
    assert runs == [2] and storage.read("a") == b"12"


def test_a_server_that_does_not_name_the_condition_is_understood(faults):
    storage = RemoteStorage("faulty://bucket/tokens")
    refusal = OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
    faults.before[:] = [refusal]
    with pytest.raises(OSError, match="pre-conditions"):
        storage.create("a", b"1")
    storage.write_bytes("a", b"1")
    faults.before[:] = [refusal]
    # Only the creation fails: to look whether there is a file is no fault.
    assert not storage.create("a", b"2")


def test_a_claim_outlives_faults_that_pass(storage, faults):
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        faults.before[:] = [OSError(errno.ESTALE, "stale")]
        assert mine.claim("a") and not faults.before
        faults.before[:] = [OSError(errno.EIO, "broken")]
        assert not others.claim("a") and others.claimed() == {"a"} and not faults.before
    assert not storage.names(FOLDER)


@pytest.mark.parametrize("number", [number for number in STAYING if number not in (errno.ENOENT, errno.EEXIST)])
def test_a_claim_that_can_never_be_made_is_an_error_and_no_silent_wait(storage, faults, number):
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        faults.before[:] = [OSError(number, os.strerror(number), "leases/a")]
        if number == errno.ENOTDIR:  # as there is no file, it is to be made, and then it is an error
            faults.before *= 2
        with pytest.raises(OSError) as caught:
            mine.claim("a")
        assert caught.value.errno == number and mine.claim("a")
        faults.before[:] = [OSError(errno.EIO, "broken")] * 4
        assert not others.claim("a") and not faults.before


def test_a_claim_that_was_made_although_the_answers_were_lost_is_ours(storage, faults):
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        faults.after[:] = [OSError(errno.EIO, "broken")]
        assert mine.claim("a")
        storage.write_bytes(FOLDER + "b", mine._claim())
        assert mine.claim("b") and not others.claim("b")

"""Claims of work between processes that share nothing but a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from grn_scale.leases import FOLDER, ClaimLost, Leases
from grn_scale.storage import Storage


@pytest.fixture(params=["local", "object store"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage.of(tmp_path / "out")
    return Storage.of(f"memory://{tmp_path.name}/out")


def other_process(storage, name: str, beat: int = 1) -> None:
    """Leave the claim of a process of another machine."""
    claim = {"owner": "o", "host": "far", "processes": "another boot", "pid": 1, "process_start": "1", "beat": beat}
    storage.write_bytes(FOLDER + name, json.dumps(claim).encode())


def test_a_claim_has_one_holder_until_it_is_given_back(storage):
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        assert mine.claim("a") and not others.claim("a") and not mine.claim("a")
        assert others.claim("b") and mine.claimed() == {"a", "b"}
        mine.release("a")
        assert others.claim("a")
    assert not storage.names(FOLDER)


def test_a_claim_that_is_renewed_is_kept_and_one_that_is_not_is_taken(storage):
    other_process(storage, "a")
    with Leases(storage, 0.2) as mine:
        for beat in range(2, 6):
            assert not mine.claim("a")
            time.sleep(0.1)
            other_process(storage, "a", beat)
        assert not mine.claim("a")
        time.sleep(0.25)
        assert mine.claim("a")


def test_held_claims_are_renewed(storage):
    with Leases(storage, 0.2) as mine:
        assert mine.claim("a")
        first = storage.read(FOLDER + "a")
        time.sleep(0.2)
        assert json.loads(storage.read(FOLDER + "a"))["beat"] > json.loads(first)["beat"]


def test_a_holder_that_slept_leaves_the_claim_to_the_one_who_took_it(storage):
    with Leases(storage, 0.2) as slept, Leases(storage, 60) as busy:
        assert slept.claim("a") and slept.claim("b") and busy.claim("c")
        slept.check("a")
        with slept._lock:  # not between a renewal's look and its write
            other_process(storage, "a")
        with pytest.raises(ClaimLost):
            slept.check("a")
        time.sleep(0.15)  # a time of renewal
        slept.release("a")
        assert json.loads(storage.read(FOLDER + "a"))["host"] == "far"
        slept.check("b")
        with slept._lock:
            storage.delete(FOLDER + "b")  # the other has taken it, done the work and given it back
        with pytest.raises(ClaimLost):
            slept.check("b")
        time.sleep(0.15)
        assert not storage.exists(FOLDER + "b") and slept.claim("b")
        slept.check("b")
        busy.release("c")
        with pytest.raises(ClaimLost):
            busy.check("c")
        with slept._lock:
            storage.write_bytes(FOLDER + "b", b"{")
        with pytest.raises(ClaimLost):
            slept.check("b")


def test_the_claim_of_a_dead_process_of_this_machine_is_free_at_once(tmp_path):
    code = ("import os, sys\nfrom grn_scale.leases import Leases\nfrom grn_scale.storage import Storage\n"
            "Leases(Storage.of(sys.argv[1]), 3600).claim('a')\nos._exit(0)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    with Leases(Storage.of(tmp_path), 3600) as mine:
        assert mine.claimed() == {"a"}
        assert mine.claim("a")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff\xfe"])
def test_a_claim_that_cannot_be_read_expires(tmp_path, content, caplog):
    storage = Storage.of(tmp_path)
    storage.write_bytes(FOLDER + "a", content)
    with Leases(storage, 0.1) as mine:
        assert not mine.claim("a")
        time.sleep(0.15)
        assert mine.claim("a")
    assert "cannot be read" in caplog.text


def test_a_folder_of_claims_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "leases").write_text("")
    with Leases(Storage.of(tmp_path), 60) as mine, pytest.raises(NotADirectoryError, match="leases"):
        mine.claim("a")

"""Files appear whole or not at all: after errors, beside other writers, and on a full disk."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys

import pytest

from grn_scale import atomic
from grn_scale.atomic import atomic_file, intended_name, remove_leftovers
from grn_scale.data.shard_writer import write_shard
from grn_scale.errors import UserError


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file.tar"
    with atomic_file(path) as first:
        first.write(b"first")
        with atomic_file(path) as second:
            second.write(b"second")
            unfinished = [entry.name for entry in tmp_path.iterdir()]
            assert len(unfinished) == 2 and {intended_name(name) for name in unfinished} == {"file.tar"}
            assert all(name.endswith(".partial") for name in unfinished)
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    assert intended_name("video-000000.tar") == "video-000000.tar" and intended_name("x.partial") == "x.partial"


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    # Every write to /dev/full fails with ENOSPC.
    monkeypatch.setattr(atomic, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    with pytest.raises(UserError, match="video-000000.tar: no space left.*run the same command again") as caught:
        with write_shard(tmp_path / "video-000000.tar") as writer:
            writer.add_video("a", bytes(1 << 20), {})
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_is_the_same_error(tmp_path):
    program = ("import sys; from grn_scale.data.shard_writer import write_shard\n"
               "with write_shard(sys.argv[1]) as writer:\n"
               "    for i in range(64): writer.add_video(str(i), bytes(1 << 16), {})\n")
    limit = (1 << 20, 1 << 20)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.tar")], capture_output=True, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), timeout=120)
    assert done.returncode == 1 and "UserError: cannot write" in done.stderr and "size limit" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_of_this_machine_go_and_others_stay(tmp_path):
    code = ("import os, sys\nfrom grn_scale.atomic import atomic_file\n"
            "with atomic_file(sys.argv[1]) as stream:\n    stream.write(b'half')\n    os._exit(1)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tar")], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "b.tar.elsewhere-1-0.partial").write_bytes(b"")
    (tmp_path / "mine.partial").write_bytes(b"")
    with atomic_file(tmp_path / "c.tar"):
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"b.tar.elsewhere-1-0.partial", "mine.partial", "c.tar"}

"""Files, claims and datasets in a bucket of a server that speaks S3, over the real client."""

from __future__ import annotations

import json
import logging
import threading
import time

import pytest

from grn_scale import storage as storage_module
from grn_scale.data import payloads
from grn_scale.data.block_cache import DiskBlocks
from grn_scale.data.dataset import CorruptSample, Dataset
from grn_scale.errors import UserError
from grn_scale.leases import FOLDER, Leases
from grn_scale.storage import Storage
from tests.helpers.dataset import bits_of, make_dataset, states_of, text_of
from tests.helpers.s3_server import s3_server

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line a request
    with s3_server() as url:
        yield url


@pytest.fixture
def storage(bucket, request) -> Storage:
    return Storage.of(f"{bucket}/{request.node.name}")


@pytest.fixture(scope="module")
def other(bucket):
    """Client of another process, which knows nothing of ours."""
    import boto3

    return boto3.client("s3")


def put(other, storage: Storage, name: str, data: bytes) -> None:
    other.put_object(Bucket="bucket", Key=f"{storage.location.removeprefix('s3://bucket/')}/{name}", Body=data)


def test_files_are_written_listed_read_and_removed(storage):
    assert storage.names() == [] and storage.names("index/") == [] and not storage.exists("a")
    for name, data in (("video-1.tar", b"0123456789"), ("video-0.tar", b""), ("index/part", b"p")):
        storage.write_bytes(name, data)
    assert storage.names() == ["video-0.tar", "video-1.tar"] and storage.names("index/pa") == ["index/part"]
    assert storage.sizes("video-") == {"video-0.tar": 0, "video-1.tar": 10}
    assert storage.read("video-1.tar") == b"0123456789" and storage.read("video-0.tar") == b""
    for offset, length, data in ((3, 4, b"3456"), (8, 9, b"89"), (10, 1, b""), (99, 1, b""), (2, 0, b"")):
        assert storage.read_range("video-1.tar", offset, length) == data
    storage.write_bytes("video-1.tar", b"new")
    assert storage.read("video-1.tar") == b"new" and storage.size("video-1.tar") == 3
    for _ in range(2):
        storage.delete("video-1.tar")
    assert not storage.exists("video-1.tar") and storage.names() == ["video-0.tar"]
    for read in (storage.read, storage.size, lambda name: storage.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=f"{storage.location}/video-1.tar"):
            read("video-1.tar")


def test_an_error_while_writing_leaves_the_old_file(storage):
    storage.write_bytes("a", b"old")
    with pytest.raises(RuntimeError), storage.write("a") as stream:
        stream.write(b"new")
        raise RuntimeError
    assert storage.read("a") == b"old" and storage.names() == ["a"]


def test_what_other_processes_write_is_seen_at_once(storage, other):
    storage.write_bytes("a", b"1")
    for number in range(3):
        assert storage.names() == ["a", *(f"new{n}" for n in range(number))]
        put(other, storage, f"new{number}", b"12")
        assert storage.read(f"new{number}") == b"12" and storage.size(f"new{number}") == 2
        put(other, storage, "a", bytes(number))
        assert storage.sizes()["a"] == storage.size("a") == len(storage.read("a")) == number


def test_a_file_is_created_once(storage):
    assert storage.create("a", b"first")
    assert not storage.create("a", b"second") and storage.read("a") == b"first"
    assert storage.create("a", b"first")  # an answer that got lost looks the same
    storage.delete("a")
    assert storage.create("a", b"third")


def test_of_two_processes_that_claim_at_once_one_succeeds(storage, monkeypatch):
    # Both have looked before either creates: what decides is the condition of the request.
    monkeypatch.setattr(type(storage), "exists", lambda *_: False)
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        for number in range(4):
            first, second = (mine, others) if number % 2 else (others, mine)
            assert first.claim(f"{number}") and not second.claim(f"{number}")
        assert mine.claimed() == {"0", "1", "2", "3"}
    assert storage.names(FOLDER) == []


def test_claims_are_renewed_and_those_left_behind_are_taken(storage):
    claim = {"owner": "o", "host": "far", "processes": "another boot", "pid": 1, "process_start": "1", "beat": 1}
    storage.write_bytes(f"{FOLDER}a", json.dumps(claim).encode())
    with Leases(storage, 0.4) as mine:
        assert mine.claim("b") and not mine.claim("a")
        before = json.loads(storage.read(f"{FOLDER}b"))
        time.sleep(0.6)
        assert mine.claim("a") and json.loads(storage.read(f"{FOLDER}b"))["beat"] > before["beat"]
        mine.check("a")


def check_all(dataset):
    for number in range(5):
        assert dataset.read_bits(dataset.locate(number)).tobytes() == bits_of(number)
    for number in range(7):
        assert dataset.read_text(text_of(number)).equal(states_of(number))


def test_a_dataset_is_written_and_read_in_ranges_and_through_the_cache(storage, other, tmp_path, monkeypatch):
    monkeypatch.setattr(payloads, "BLOCK", 1024)
    info = make_dataset(storage.location)
    make_dataset(tmp_path / "local")
    for name in ("video-000001.tar", "dataset.json"):
        assert storage.read(name) == (tmp_path / "local" / name).read_bytes()
    check_all(Dataset.open(storage.location))
    cache = DiskBlocks(tmp_path / "cache", 1 << 20)
    check_all(Dataset.open(storage.location, cache=cache))
    # The blocks are here now: the store is asked for the index only.
    monkeypatch.setattr(type(storage), "read_range", lambda *_: pytest.fail("a ranged read"))
    check_all(Dataset.open(storage.location, cache=cache))
    monkeypatch.undo()
    put(other, storage, "video-000001.tar", b"short")
    with pytest.raises(UserError, match="video-000001.tar has 5 bytes"):
        Dataset.open(storage.location)
    dataset = Dataset.open(storage.location, check_files=False)
    with pytest.raises(CorruptSample, match="video-000001.tar.*clip3.*ends after"):
        dataset.read_bits(dataset.locate(3))
    assert info.samples == 5


def test_a_missing_bucket_is_named(bucket):
    storage = Storage.of("s3://typo/tokens")
    assert storage.names() == [] and not storage.exists("a")
    for write in (lambda: storage.write_bytes("a", b"1"), lambda: storage.create("a", b"1")):
        with pytest.raises(FileNotFoundError, match="bucket does not exist.*s3://typo/tokens/a"):
            write()


def test_threads_share_one_storage(storage):
    threads = [threading.Thread(target=lambda n=n: storage.write_bytes(f"{n}", b"%d" % n)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: storage.read(name) for name in storage.names()} == {f"{n}": b"%d" % n for n in range(8)}


def test_missing_credentials_are_one_error(bucket, monkeypatch):
    import s3fs

    monkeypatch.setattr(storage_module, "RETRY_SECONDS", ())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(OSError, match="cannot read s3://bucket/a: NoCredentialsError"):
            Storage.of("s3://bucket").read("a")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()

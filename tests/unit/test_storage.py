"""File operations on folders and URLs, and a dataset read from a URL: through blocks, a cache on disk, and errors."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from grn_scale import storage as storage_module
from grn_scale.config import load_config
from grn_scale.data import block_cache, payloads
from grn_scale.data.block_cache import Block, DiskBlocks
from grn_scale.data.dataset import CorruptSample, Dataset
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import LocalStorage, Storage
from tests.helpers.dataset import bits_of, make_dataset, states_of, text_of

BLOCK = 1024


class ObjectStore(MemoryFileSystem):
    """Objects in memory; counts ranged reads, and the next of them fail with the errors of `failures`."""

    protocol = "objects"
    store: dict = {}
    pseudo_dirs = [""]
    failures: list[Exception] = []
    reads = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        if start is not None:
            type(self).reads += 1
            if self.failures:
                raise self.failures.pop(0)
        return super().cat_file(path, start=start, end=end, **kwargs)


@pytest.fixture
def url(monkeypatch):
    """Empty folder in an object store."""
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    monkeypatch.setattr(storage_module, "OBJECT_STORES", {"objects"})
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", ())
    monkeypatch.setattr(ObjectStore, "store", {})
    monkeypatch.setattr(ObjectStore, "pseudo_dirs", [""])
    monkeypatch.setattr(ObjectStore, "failures", [])
    monkeypatch.setattr(ObjectStore, "reads", 0)
    monkeypatch.setattr(payloads, "BLOCK", BLOCK)
    return "objects://bucket/tokens"


@pytest.fixture(params=["folder", "url"])
def storage(request, tmp_path, url) -> Storage:
    return Storage.of(tmp_path / "tokens" if request.param == "folder" else url)


def test_files_are_written_listed_read_and_removed(storage):
    assert storage.names() == [] and storage.names("index/") == [] and not storage.exists("a")
    for name, data in (("video-1.tar", b"0123456789"), ("video-0.tar", b""), ("index/part", b"p"),
                       ("text-0.tar", b"t")):
        storage.write_bytes(name, data)
    assert storage.names() == ["text-0.tar", "video-0.tar", "video-1.tar"]
    assert storage.sizes("video-") == {"video-0.tar": 0, "video-1.tar": 10}
    assert storage.names("index/") == storage.names("index/pa") == ["index/part"] and storage.names("index/x") == []
    assert storage.read("video-1.tar") == b"0123456789" and storage.size("video-1.tar") == 10
    assert storage.read_range("video-1.tar", 3, 4) == b"3456" and storage.read_range("video-1.tar", 8, 9) == b"89"
    storage.write_bytes("video-1.tar", b"new")
    assert storage.read("video-1.tar") == b"new" and storage.exists("index/part")
    for _ in range(2):
        storage.delete("video-1.tar")
    assert not storage.exists("video-1.tar")
    for read in (storage.read, storage.size, lambda name: storage.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("video-1.tar")


def test_an_error_while_writing_leaves_the_old_file(storage):
    storage.write_bytes("a", b"old")
    with pytest.raises(RuntimeError), storage.write("a") as stream:
        stream.write(b"new")
        raise RuntimeError
    assert storage.read("a") == b"old" and storage.names() == ["a"]


def test_of_all_that_create_a_file_one_does(storage):
    with ThreadPoolExecutor(8) as pool:
        won = [n for n, made in enumerate(pool.map(lambda n: storage.create("leases/0", b"%d" % n), range(16))) if made]
    if isinstance(storage, LocalStorage):  # the store in memory is not made for threads
        assert len(won) == 1 and storage.read("leases/0") == b"%d" % won[0]
    assert not storage.create("leases/0", b"late") and storage.names("leases/") == ["leases/0"]
    storage.delete("leases/0")
    assert storage.create("leases/0", b"again") and storage.read("leases/0") == b"again"


def test_a_storage_is_found_by_path_and_url_and_travels_to_other_processes(tmp_path, url):
    assert Storage.of(f"file://{tmp_path}").folder == tmp_path and Storage.of(Storage.of(url)).location == url
    for found, name in (Storage.of_file(tmp_path / "a.tar"), Storage.of_file(f"{url}/a.tar")):
        assert name == "a.tar" and found / "x" in (f"{tmp_path}/x", f"{url}/x")
    for location in (str(tmp_path), url):
        Storage.of(location).write_bytes("a", b"1")
        # our own bytes, of this process: worker processes receive a storage this way
        assert pickle.loads(pickle.dumps(Storage.of(location))).read("a") == b"1"
    assert Storage.of(f"local://{tmp_path}").folder == tmp_path


@pytest.mark.parametrize("url, message", [
    ("nothing://x", "nothing://x cannot be opened: Protocol not known: nothing"),
    ("absent://x", "absent://x cannot be opened: .*no_such_driver.*install the package"),
])
def test_a_url_that_cannot_be_opened_is_a_configuration_error(url, message):
    fsspec.register_implementation("absent", "no_such_driver.FileSystem", clobber=True,
                                   errtxt="install no_such_driver for absent://")
    with pytest.raises(ConfigError, match=message):
        Storage.of(url)


def test_a_missing_driver_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "paramiko", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="sftp://host/tokens cannot be opened: .*; pip install 'paramiko'"):
        Storage.of("sftp://host/tokens")


def test_a_client_that_cannot_start_is_one_message():
    class Unreachable(MemoryFileSystem):
        def __init__(self, **options):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(UserError, match="unreachable://x cannot be opened: ConnectionRefusedError.*see to the server"):
        Storage.of("unreachable://x")


def test_a_file_server_is_read_and_not_written_to(url, monkeypatch):
    make_dataset(url)
    monkeypatch.setattr(storage_module, "OBJECT_STORES", {"s3"})
    storage = Storage.of(url)
    for write in (lambda: storage.write_bytes("a", b""), lambda: storage.create("a", b"")):
        with pytest.raises(ConfigError, match="tokens can be read but not written to.*mount it as a folder"):
            write()
    assert not storage.exists("a")
    check_all(Dataset.open(url))


def test_whatever_a_remote_store_raises_is_an_os_error_that_names_the_file(url):
    storage = Storage.of(url)
    storage.write_bytes("a", b"1")
    where = "objects://bucket/tokens/a"
    for failure, kind, message in (
            (RuntimeError("throttled"), OSError, f"cannot read {where}: RuntimeError.*throttled"),
            (TimeoutError("slow"), TimeoutError, f"slow.*{where}"),
            (PermissionError("Access Denied"), PermissionError, f"Access Denied.*{where}"),
            (FileNotFoundError("no bucket"), FileNotFoundError, f"no bucket.*{where}"),
            (OSError(errno.EBUSY, "SlowDown"), OSError, f"SlowDown.*{where}"),
            (OSError("Forbidden"), OSError, f"cannot read {where}.*Forbidden")):
        ObjectStore.failures[:] = [failure]
        with pytest.raises(kind, match=message) as caught:
            storage.read_range("a", 0, 1)
        assert caught.value.__cause__ is failure
    assert storage.read_range("a", 0, 1) == b"1"


def test_no_bytes_are_no_request(url):
    Storage.of(url).write_bytes("a", b"1")
    assert Storage.of(url).read_range("a", 0, 0) == b"" and ObjectStore.reads == 0


def test_a_full_disk_under_an_upload_is_one_clear_error(url, monkeypatch):
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **_: open("/dev/full", "wb"))
    with pytest.raises(UserError, match="tokens/a: no space left.*set TMPDIR"):
        Storage.of(url).write_bytes("a", bytes(1 << 20))
    assert Storage.of(url).names() == []


def check_all(dataset):
    for number in range(5):
        data = dataset.read_bits(dataset.locate(number))
        assert data.tobytes() == bits_of(number) and data.flags.writeable
    for number in range(7):
        assert dataset.read_text(text_of(number)).equal(states_of(number))
        assert dataset.read_text_ids(text_of(number)) == [number] * len(states_of(number))


def test_a_dataset_written_to_a_url_is_the_one_written_to_a_folder(url, tmp_path):
    assert make_dataset(url) == make_dataset(tmp_path)
    assert Storage.of(url).read("video-000000.tar") == (tmp_path / "video-000000.tar").read_bytes()
    check_all(Dataset.open(url))
    Storage.of(url).write_bytes("video-000001.tar", b"short")
    with pytest.raises(UserError, match="objects://bucket/tokens/video-000001.tar has 5 bytes"):
        Dataset.open(url)
    with pytest.raises(CorruptSample, match="video-000001.tar.*clip3.*ends after"):
        dataset = Dataset.open(url, check_files=False)
        dataset.read_bits(dataset.locate(3))
    Storage.of(url).delete("video-000001.tar")
    with pytest.raises(UserError, match="is missing"):
        Dataset.open(url)
    with pytest.raises(FileNotFoundError):
        Dataset.open(url, check_files=False).read_bits(dataset.locate(3))


def test_neighbours_come_with_a_block_and_large_payloads_come_alone(url, monkeypatch):
    make_dataset(url)
    dataset = Dataset.open(url)
    rows = dataset.rows(0)
    assert all(row.offset // BLOCK == 0 for row in rows[:1])
    for _ in range(3):
        dataset.read_bits(rows[0])
    assert ObjectStore.reads == 1
    monkeypatch.setattr(payloads, "LARGE", 12)
    dataset = Dataset.open(url)
    for _ in range(3):
        assert dataset.read_bits(rows[0]).tobytes() == bits_of(0)
    assert ObjectStore.reads == 4


def test_a_failed_read_can_be_tried_again(url, tmp_path):
    make_dataset(url)
    for cache in (None, DiskBlocks(tmp_path, 1 << 20)):
        dataset = Dataset.open(url, cache=cache)
        ObjectStore.failures[:] = [RuntimeError("connection reset")]
        with pytest.raises(OSError, match="connection reset"):
            dataset.read_bits(dataset.locate(0))
        check_all(dataset)


def test_blocks_on_disk_serve_every_later_process(url, tmp_path):
    make_dataset(url)
    cache = DiskBlocks(tmp_path / "cache", 1 << 20)
    check_all(Dataset.open(url, cache=cache))
    fetched = ObjectStore.reads
    assert fetched == sum(-(-len(Storage.of(url).read(f"{family}-00000{i}.tar")) // BLOCK) for i in (0, 1)
                          for family in ("video", "text")) - unused_blocks(url)
    # our own bytes, of this process: worker processes receive a dataset this way
    check_all(pickle.loads(pickle.dumps(Dataset.open(url, cache=cache))))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_all(Dataset.open(url, cache=DiskBlocks(tmp_path / "cache", 1 << 20))), range(8)))
    assert ObjectStore.reads == fetched


def unused_blocks(url) -> int:
    """Blocks of the tars that hold no payload."""
    dataset, used, blocks = Dataset.open(url), set(), 0
    for shard in (*dataset.info.video_shards, *dataset.info.text_shards):
        blocks += -(-shard.bytes // BLOCK)
    for number in range(5):
        row = dataset.locate(number)
        used |= {("video", row.shard, at // BLOCK) for at in (row.offset, row.offset + row.length - 1)}
    for number in range(7):
        row = dataset.text_row(text_of(number))
        for offset, length in ((row.ids_offset, row.ids_length), (row.states_offset, row.states_length)):
            used |= {("text", number >= 4, at // BLOCK) for at in (offset, offset + length - 1)}
    return blocks - len(used)


def blocks_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*-*") if path.is_file())


def test_a_block_is_fetched_once_however_many_threads_want_it(url, tmp_path):
    make_dataset(url)
    for number, cache in enumerate((None, DiskBlocks(tmp_path, 1 << 20)), 1):
        dataset = Dataset.open(url, cache=cache)
        row = dataset.locate(0)
        start = threading.Barrier(8)

        def read(_, dataset=dataset, row=row, start=start):
            start.wait()
            return dataset.read_bits(row).tobytes()

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(read, range(8))) == {bits_of(0)}
        assert ObjectStore.reads == number


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_block_on_disk_is_fetched_again(url, tmp_path, damage):
    make_dataset(url)
    dataset = Dataset.open(url, cache=DiskBlocks(tmp_path, 1 << 20))
    check_all(dataset)
    fetched = ObjectStore.reads
    for path in blocks_of(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[:100] if damage == "cut" else bytes(byte ^ 1 for byte in data))
    check_all(Dataset.open(url, cache=DiskBlocks(tmp_path, 1 << 20)))
    assert ObjectStore.reads == 2 * fetched
    check_all(Dataset.open(url, cache=DiskBlocks(tmp_path, 1 << 20)))
    assert ObjectStore.reads == 2 * fetched


def test_damage_in_the_remote_shard_is_a_corrupt_sample(url, tmp_path):
    make_dataset(url)
    dataset = Dataset.open(url)
    row = dataset.locate(1)
    shard = bytearray(Storage.of(url).read("video-000000.tar"))
    shard[row.offset] ^= 1
    Storage.of(url).write_bytes("video-000000.tar", bytes(shard))
    for cache in (None, DiskBlocks(tmp_path, 1 << 20)):
        with pytest.raises(CorruptSample, match="video-000000.tar.*clip1.*checksum"):
            Dataset.open(url, cache=cache).read_bits(row)


def fill(cache: DiskBlocks, count: int, size: int = 1000, first: int = 0) -> None:
    for number in range(first, first + count):
        cache.read(Block("objects://x", "ab" * 32, number, size), 0, 1, lambda: bytes(size))


def test_the_cache_stays_within_its_bound_and_what_was_used_last_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(block_cache, "USED_SECONDS", -1)
    (tmp_path / "mine").write_bytes(bytes(5000))
    cache = DiskBlocks(tmp_path, 10_000)
    for first in range(0, 60, 2):
        fill(cache, 2, first=first)
        fill(cache, 1)
        assert sum(path.stat().st_size for path in blocks_of(tmp_path)) <= 10_000
        time.sleep(0.002)
    numbers = [int(path.name.partition("-")[2]) for path in blocks_of(tmp_path)]
    assert 0 in numbers and max(numbers) == 59 and min(numbers[1:]) >= 50
    smaller = DiskBlocks(tmp_path, 3_000)  # an earlier run was allowed more
    fill(smaller, 1, first=100)
    assert len(blocks_of(tmp_path)) <= 3 and (tmp_path / "mine").stat().st_size == 5000


def test_what_a_killed_process_left_is_removed_and_other_files_are_not(tmp_path):
    cache = DiskBlocks(tmp_path, 10_000)
    fill(cache, 1)
    (block,) = blocks_of(tmp_path)
    old, new = (block.with_name(f"{block.name}.host-1-{n}.partial") for n in (1, 2))
    other = block.with_name("notes.partial")
    for path in (old, new, other):
        path.write_bytes(b"unfinished")
    for path in (old, other):
        os.utime(path, (0, 0))
    fill(cache, 1, first=1)
    assert not old.exists() and new.exists() and other.exists()


def test_a_cache_that_cannot_be_written_costs_the_cache_and_not_the_run(url, tmp_path, monkeypatch, caplog):
    from grn_scale import atomic

    make_dataset(url)
    dataset = Dataset.open(url, cache=DiskBlocks(tmp_path, 1 << 20))
    monkeypatch.setattr(atomic, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    check_all(dataset)
    assert [record.message for record in caplog.records if "no space left" in record.message][1:] == []
    assert blocks_of(tmp_path) == []


def test_processes_share_one_cache_within_its_bound(tmp_path):
    program = ("import sys\nfrom grn_scale.data.block_cache import Block, DiskBlocks\n"
               "cache = DiskBlocks(sys.argv[1], 64_000)\n"
               "for n in range(300):\n"
               "    data = n.to_bytes(2, 'big') * 500\n"
               "    block = Block('s3://x', 'ab' * 32, n * 7 % 150, 1000)\n"
               "    assert len(cache.read(block, 10, 20, lambda: data)) == 20\n")
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    for worker in workers:
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == 0, errors
    assert 0 < sum(path.stat().st_size for path in blocks_of(tmp_path)) <= 64_000


def test_the_configuration_names_the_cache(tmp_path):
    demo = Path(__file__).resolve().parents[2] / "configs/runs/demo.yaml"
    assert DiskBlocks.of(load_config(demo, []).data) is None
    cache = DiskBlocks.of(load_config(demo, [f"data.cache_dir={tmp_path}/c", "data.cache_gigabytes=0.5"]).data)
    assert (cache.folder, cache.limit) == (tmp_path / "c", 500_000_000)
    with pytest.raises(ConfigError, match="cache_gigabytes"):
        load_config(demo, ["data.cache_gigabytes=0"])
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="data.cache_dir is .*file.* cannot be used"):
        DiskBlocks(tmp_path / "file" / "cache", 1)

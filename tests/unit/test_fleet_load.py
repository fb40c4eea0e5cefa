"""What a fleet asks of the storage that all its tasks share: operations are counted, never timed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter

import pytest

from grn_scale.data.dataset_info import read_dataset_info
from grn_scale.data.manifest_chunks import ManifestChunk
from grn_scale.data.schema import ShardInfo
from grn_scale.data_pipeline import finish
from grn_scale.data_pipeline.chunks import VideoSettings
from grn_scale.data_pipeline.encode_texts import TextSettings
from grn_scale.data_pipeline.finish import LEASE as FINISH_LEASE
from grn_scale.data_pipeline.finish import QUARANTINE_FILE, finished, quarantine_unfinished, write_quarantine
from grn_scale.data_pipeline.fleet_status import STATUS_FILE, FleetStatus, Workers
from grn_scale.data_pipeline.job import GENERATION_FILE, Job
from grn_scale.data_pipeline.meter import WorkerMeter, refresh_seconds
from grn_scale.data_pipeline.read_ahead import READERS, read_ahead
from grn_scale.data_pipeline.records import ChunkRecord, RecordName, Records, SourcesRecord
from grn_scale.leases import Leases
from tests.helpers.counting_storage import CountingStorage
from tests.helpers.token_dataset import write_tokens

CHUNKS, TASKS, WORKERS_A_TASK = 12, 100, 4


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def bad_line(line: int, reason: str = "corrupt") -> dict:
    return {"line": line, "id": f"clip {line}", "path": f"{line}.mp4", "key": sha(line)[:32], "reason": reason,
            "detail": "wörds"}


@pytest.fixture
def storage(tmp_path):
    return CountingStorage(tmp_path)


@pytest.fixture
def job(storage, tmp_path):
    chunks = tuple(ManifestChunk(10 * i, 10, 4 * i + 1, 4, sha(i)) for i in range(CHUNKS))
    return Job(storage, tmp_path / "clips.jsonl", chunks, VideoSettings("t", 4, 4, 16.0, 9, 2),
               TextSettings("e", 64, 32, True, "bf16"), tuple(sha("digest", i) for i in range(CHUNKS)), {})


def record(job: Job, number: int, *bad: dict, digest: str = "", retries: int = 0) -> ChunkRecord:
    shard = ShardInfo(f"video-{number:06d}.tar", 4, 5, sha("tar", number), f"video-{number:06d}-00000000.parquet")
    failed = {line["key"]: line["reason"] for line in bad if line["reason"] == "corrupt"}
    return ChunkRecord(number, digest or job.digests[number], retries, bad, failed, sha("v"), sha("t"), shard, None)


def write_all(job: Job, numbers=range(CHUNKS)) -> None:
    """Records of chunks of which every third has bad lines, and the files they name."""
    records = Records(job.storage)
    for number in numbers:
        made = record(job, number, *([bad_line(4 * number + 1), bad_line(4 * number + 2, "missing")]
                                     if number % 3 == 0 else []))
        job.storage.path(made.video.name).write_bytes(b"12345")
        job.storage.path("index").mkdir(exist_ok=True)
        job.storage.path(f"index/{made.video.part}").touch()
        records.write(made)
    job.storage.taken()


def test_what_workers_need_to_know_of_finished_chunks_is_told_by_one_listing(job, storage):
    write_all(job, range(9))
    records = Records(storage)
    records.refresh()
    names = records.finished(job.digests)
    assert [(name.number, name.retries, name.bad, name.passing, name.failed) for name in names] == [
        (i, 0, *((2, 1, 1) if i % 3 == 0 else (0, 0, 0))) for i in range(9)]
    assert names == [r.name for r in records.of_job(job.digests)] == records.all()
    assert storage.taken() == {"list": 1, "read": 9}
    assert not records.fingerprint(job.digests) and records.fingerprint(job.digests[:9])


def test_a_record_gives_way_to_a_newer_one_and_another_content_has_another_name(job, storage):
    records = Records(storage)
    first, other = record(job, 3, bad_line(13)), record(job, 3, bad_line(13, "timeout"))
    assert first.name != other.name and RecordName.of(first.name) == first.name
    former = record(job, 3, digest=sha("former"))
    for made in (former, first, again := record(job, 3, retries=1)):
        records.write(made)
    assert storage.names("chunks/") == [again.name] and records.get(3, job.digests[3]) == again.name
    storage.write_bytes(first.name, first.to_json())
    storage.write_bytes(former.name, former.to_json())
    storage.write_bytes("chunks/000003.json.1.partial", b"")
    records.refresh()
    assert records.get(3, job.digests[3]) == again.name and len(records.of_number(3)) == 3
    assert RecordName.of("chunks/000003.json") is None


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", None])
def test_records_that_are_damaged_or_whose_shards_are_not_whole_are_removed(job, storage, damage, caplog):
    write_all(job)
    records = Records(storage)
    records.refresh()
    damaged = records.get(4, job.digests[4])
    data = storage.read(damaged)
    storage.write_bytes(damaged, data.replace(b'"samples": 4', b'"samples": 3') if damage is None else damage)
    assert records.read(damaged) is None and "cannot be used" in caplog.text
    storage.path("video-000007.tar").write_bytes(b"123")
    storage.path("index/video-000009-00000000.parquet").unlink()
    records.drop_incomplete()
    left = [number for number in range(CHUNKS) if number not in (4, 7, 9)]
    assert [name.number for name in records.finished(job.digests)] == left
    records.refresh()
    assert [name.number for name in records.finished(job.digests)] == left


def test_only_bad_lines_of_the_present_manifest_and_settings_are_shown(job, storage):
    write_all(job, range(6))
    records = Records(storage)
    records.write(record(job, 6, bad_line(99), digest=sha("former")))
    records.write_sources(6, SourcesRecord())
    records.write_sources(7, SourcesRecord({}, sha("former"), (bad_line(98),)))
    records.write_sources(8, SourcesRecord({}, job.digests[8], (bad_line(33), bad_line(34))))
    records.write_sources(3, SourcesRecord({}, job.digests[3], (bad_line(97),)))  # finished since
    records.refresh()
    storage.taken()
    assert write_quarantine(job, records) == {"corrupt": 4, "missing": 2}
    lines = [json.loads(line) for line in storage.path(QUARANTINE_FILE).read_text().splitlines()]
    assert [line["line"] for line in lines] == [1, 2, 13, 14, 33, 34] and "key" not in lines[0]
    # Records without bad lines are not read, nor sources of finished chunks.
    assert storage.taken() == {"list": 1, "delete": 1, "write": 1, "read": 2 + 3}


def test_of_tasks_that_stop_at_once_one_writes_the_quarantine(job, storage):
    write_all(job)
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        assert others.claim(FINISH_LEASE)
        quarantine_unfinished(job, Records(storage), mine)
        assert not storage.exists(QUARANTINE_FILE)
        others.release(FINISH_LEASE)
        storage.write_bytes(GENERATION_FILE, b"of a job that took the folder over")
        quarantine_unfinished(job, Records(storage), mine)
        assert not storage.exists(QUARANTINE_FILE)
        storage.write_bytes(GENERATION_FILE, job.generation.encode())
        quarantine_unfinished(job, Records(storage), mine)
        assert len(storage.path(QUARANTINE_FILE).read_bytes().splitlines()) == 8 and not mine.claimed()


def test_whether_a_job_is_finished_takes_no_look_at_its_records(job, storage):
    write_all(job)
    records = Records(storage)
    records.refresh()
    storage.taken()
    storage.write_bytes("finished.json", json.dumps({"records": "of others"}).encode())
    assert finished(job, records) is None
    assert storage.taken() == {"write": 1, "read": 1}
    storage.write_bytes("finished.json", b"[")
    assert finished(job, records) is None


def test_who_waits_for_the_dataset_reads_a_small_file_and_no_record(job, storage, tmp_path, monkeypatch):
    write_all(job)
    write_tokens(tmp_path, range(1))
    records = Records(storage)
    records.refresh()
    values = {"records": records.fingerprint(job.digests), "snapshot": read_dataset_info(storage).snapshot,
              "quarantined": {"corrupt": 4}}
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        assert others.claim(FINISH_LEASE)
        reads: list[str] = []
        monkeypatch.setattr(storage, "read", lambda name: reads.append(name) or CountingStorage.read(storage, name))
        # While this one sleeps, the other finishes.
        done = json.dumps(values)
        monkeypatch.setattr(finish.time, "sleep", lambda _: storage.path("finished.json").write_text(done))
        found = finish.finish_once(job, records, None, mine)
    assert found.quarantined == {"corrupt": 4} and found.info == read_dataset_info(storage)
    assert reads.count("finished.json") == 2 and not any(name.startswith("chunks/") for name in reads)


def speak(storage, name: str, beat: int, state: str = "working") -> None:
    values = WorkerMeter(storage, name, decoders=1).status(state)
    storage.path("workers").mkdir(exist_ok=True)
    storage.path(f"workers/{name}.json").write_text(json.dumps({**values, "lines": beat, "wall_seconds": 1.0}))


def test_the_status_of_a_hundred_tasks_costs_one_of_them_a_look_and_the_others_a_read(job, storage):
    write_all(job)
    tasks = [FleetStatus(job, Records(storage), Leases(storage, 60), 0.0) for _ in range(TASKS)]
    for beat in range(3):
        for worker in range(TASKS * WORKERS_A_TASK):
            speak(storage, f"w{worker}", beat)
        storage.taken()
        for task in tasks:
            task.refresh("running")
    keeper = Counter(list=2, read=TASKS * WORKERS_A_TASK + 1, write=1)  # of its lease, one read
    assert Counter(storage.taken()) == keeper + Counter(read=TASKS - 1)
    status = json.loads(storage.read(STATUS_FILE))
    assert status["workers"] == TASKS * WORKERS_A_TASK and status["lines"] == status["lines_in_all"] == 4 * CHUNKS
    assert status["bad_lines"] == 8 and all(task.latest.items() <= status.items() for task in tasks)


def test_another_task_goes_on_with_the_status_and_the_last_one_says_how_it_ended(job, storage):
    tasks = [FleetStatus(job, Records(storage), Leases(storage, 60), 0.0) for _ in range(3)]
    for _ in range(2):
        for task in tasks:
            task.refresh("running")
    tasks[0].end("stopped")
    assert json.loads(storage.read(STATUS_FILE))["state"] == "stopped"
    for _ in range(2):
        tasks[2].refresh("running")
    assert json.loads(storage.read(STATUS_FILE))["state"] == "running"
    write_all(job)
    tasks[1].end("done")  # another one keeps it, but what is finished everybody sees
    assert json.loads(storage.read(STATUS_FILE))["state"] == "running" and tasks[1].latest["chunks"] == CHUNKS
    tasks[2].end("done")
    assert json.loads(storage.read(STATUS_FILE))["state"] == "done" and not storage.names("leases/")


def test_what_a_former_run_left_is_not_taken_for_the_status_of_this_one(job, storage):
    former = FleetStatus(job, Records(storage), Leases(storage, 60), 0.0)
    former.refresh("running")
    left = json.loads(storage.read(STATUS_FILE))
    storage.write_bytes(STATUS_FILE, json.dumps({**left, "clips": 77, "state": "running"}).encode())
    began = time.time()
    mine = FleetStatus(job, Records(storage), Leases(storage, 60), began)  # the claim is a dead node's
    for _ in range(2):
        mine.refresh("running")
    write_all(job)
    speak(storage, "w0", 4)
    mine.end("done")
    assert mine.latest["clips"] == 0 and mine.latest["chunks"] == CHUNKS and mine.latest["workers"] == 1
    assert mine.latest.keys() == left.keys() - {"state", "written"}


def test_the_status_of_another_task_comes_without_its_state(job, storage):
    keeper, other = (FleetStatus(job, Records(storage), Leases(storage, 60), 0.0) for _ in range(2))
    speak(storage, "w0", 4)
    for _ in range(2):
        keeper.refresh("running")
        other.refresh("running")
    storage.taken()
    other.end("done")
    assert "read" in storage.taken() and other.latest == keeper.latest
    assert other.latest["workers"] == 1 and not {"state", "written"} & other.latest.keys()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b'{"written": "now"}', b"\xff"])
def test_a_status_file_of_another_form_is_not_believed(job, storage, content):
    keeper, other = (FleetStatus(job, Records(storage), Leases(storage, 60), 0.0) for _ in range(2))
    keeper.refresh("running")
    before = dict(other.latest)
    storage.path(STATUS_FILE).write_bytes(content)
    other.refresh("running")
    assert other.latest == before


def test_who_keeps_the_status_gives_way_where_its_claim_was_taken_over(job, storage):
    first, second = (FleetStatus(job, Records(storage), Leases(storage, 60), 0.0) for _ in range(2))
    first.refresh("running")
    storage.delete("leases/status")
    second.refresh("running")
    second.refresh("running")
    storage.taken()
    first.refresh("running")
    assert storage.taken().get("write", 0) == 0


def test_a_status_that_cannot_be_written_costs_no_work(job, storage, monkeypatch, caplog):
    def full(*args):
        raise OSError("no space")

    status = FleetStatus(job, Records(storage), Leases(storage, 60), 0.0)
    monkeypatch.setattr(storage, "write_bytes", full)
    status.refresh("running")
    assert "status.json is out of date: no space" in caplog.text and status.latest["chunks"] == 0


def test_files_of_dead_workers_are_read_ever_more_rarely_and_these_count_as_gone(storage):
    for name in ("dead", "alive", "ended"):
        speak(storage, name, 0, "done" if name == "ended" else "working")
    storage.path("workers/odd.json").write_text("{")
    workers = Workers(storage)
    for look in range(64):
        speak(storage, "alive", look)
        states = Counter(values["state"] for values in workers.look(0.0))
    assert states == {"working": 1, "gone": 1, "done": 1}
    assert storage.taken() == {"list": 64, "read": 64 + 3 * 7}
    speak(storage, "dead", 9)  # it only slept
    found = [sum(values["lines"] == 9 for values in workers.look(0.0)) for _ in range(80)]
    assert found[0] == 0 and found[-1] == 1
    os.remove(storage.path("workers/alive.json"))
    assert len(workers.look(0.0)) == 2 and not workers.look(2e9)


def test_large_jobs_are_looked_at_more_rarely():
    assert refresh_seconds(1) == refresh_seconds(400) == 2.0
    assert refresh_seconds(4000) == 20.0 and refresh_seconds(10**5) == refresh_seconds(10**7) == 60.0


def test_reading_ahead_keeps_the_order_and_goes_only_so_far():
    asked = []
    results = read_ahead(lambda i: asked.append(i) or i * i, range(1000))
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()
    assert len(asked) <= 5 + 2 * READERS and list(read_ahead(str, ())) == []
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda i: 1 // i, (2, 1, 0, 1)))

"""What the processes of a tokenize job agree on through its folder: the environment, and what is tried again."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import replace

import pytest

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data_pipeline import retries
from grn_scale.data_pipeline.chunks import VideoSettings
from grn_scale.data_pipeline.encode_texts import TextSettings
from grn_scale.data_pipeline.environment import differences, environment
from grn_scale.data_pipeline.job import JOB_FILE, begin_generation, claim_folder, open_job
from grn_scale.data_pipeline.published import PublishedTars
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.data_pipeline.retries import FOLDER, ask_for_retry, ask_for_returned, asked_for
from grn_scale.errors import UserError
from grn_scale.leases import Leases
from grn_scale.storage import Storage
from tests.helpers.token_dataset import write_tokens

VIDEO = VideoSettings("tokenizer", 4, 4, 16.0, 9, 2)
TEXT = TextSettings("encoder", 64, 32, True, "bf16")
HERE = {"device": "cpu", "torch": "2.13.0"}
NEW = {"device": "cpu", "torch": "2.14.0"}


@pytest.fixture(params=["local", "object store"])
def storage(request, tmp_path):
    return Storage.of(tmp_path / "out" if request.param == "local" else f"memory://{tmp_path.name}/out")


def claim(storage, facts, accepted_by=None):
    return claim_folder(storage, VIDEO, 3, "bf16", facts, accepted_by)


def opened(storage, folder):
    manifest = folder / "clips.jsonl"
    manifest.write_text('{"path": "a.mp4", "caption": "a"}\n')
    with Leases(storage, 60) as leases:
        return open_job(storage, manifest, TokenizeConfig(shard_samples=3), VIDEO, TEXT, leases)


def test_the_environment_names_what_bytes_depend_on_and_is_plain():
    config = TokenizeConfig()
    facts = environment(config, "cpu")
    assert facts == json.loads(json.dumps(facts)) == environment(replace(config, decode_processes=3), "cpu")
    assert {"device", "cpu", "torch", "av", "libavcodec", "libswscale", "PIL", "sentencepiece"} <= facts.keys()
    assert differences(facts, environment(replace(config, threads=2), "cpu")) == "tokenize.threads 1 -> 2"
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == "a 1 -> (not known); c (not known) -> 3"


def test_another_environment_is_refused_with_both_values_and_the_remedies(storage):
    assert claim(storage, HERE) == claim(storage, HERE) == "bf16"
    before = storage.read(JOB_FILE)
    with pytest.raises(UserError, match=r"torch 2\.13\.0 -> 2\.14\.0.*new output folder.*--accept-environment"):
        claim(storage, NEW)
    assert storage.read(JOB_FILE) == before


def test_an_accepted_environment_stops_the_workers_of_the_former_one(storage, tmp_path):
    claim(storage, HERE)
    former = opened(storage, tmp_path)
    begin_generation(former)
    former.check_generation()
    former.check_environment(HERE)
    claim(storage, NEW, "first")
    job = opened(storage, tmp_path)
    begin_generation(job)
    job.check_generation()
    job.check_environment(NEW)
    assert job.digests == former.digests  # what is finished stays so
    with pytest.raises(UserError, match="another environment has begun to work"):
        former.check_generation()
    with pytest.raises(UserError, match=r"torch 2\.14\.0 -> 2\.13\.0"):
        claim(storage, HERE)
    with pytest.raises(UserError, match=r"torch 2\.14\.0 -> 2\.13\.0"):
        job.check_environment(HERE)
    values = json.loads(storage.read(JOB_FILE))
    assert values["environment"] == NEW and values["former_environments"] == [HERE]


def test_of_the_processes_of_one_command_the_first_decides_which_environment_is_accepted(storage):
    claim(storage, HERE)
    claim(storage, NEW, "slurm-7")
    claim(storage, NEW, "slurm-7")
    with pytest.raises(UserError, match="slurm-7 has accepted .* already.*cpu .not known. -> AVX2") as refused:
        claim(storage, {**NEW, "cpu": "AVX2"}, "slurm-7")
    assert "--accept-environment" not in str(refused.value)
    claim(storage, HERE, "slurm-8")
    assert json.loads(storage.read(JOB_FILE))["former_environments"] == [HERE, NEW]


def test_in_a_new_folder_too_the_first_process_of_an_accepting_command_decides(storage):
    claim(storage, HERE, "slurm-7")
    with pytest.raises(UserError, match="slurm-7 has accepted .* already"):
        claim(storage, NEW, "slurm-7")


def test_a_folder_whose_environment_is_not_known_has_to_be_accepted(storage):
    claim(storage, HERE)
    values = json.loads(storage.read(JOB_FILE))
    del values["environment"]
    storage.write_bytes(JOB_FILE, json.dumps(values).encode())
    with pytest.raises(UserError, match=r"torch \(not known\) -> 2\.13\.0"):
        claim(storage, HERE)
    claim(storage, HERE, "command")
    claim(storage, HERE)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"video": 1, "shard_samples": 3, "text_states": ""}',
                                     b'{"video": {}, "shard_samples": 3, "text_states": "", "environment": 5}'])
def test_a_job_file_that_cannot_be_read_is_refused(tmp_path, content):
    storage = Storage.of(tmp_path)
    storage.write_bytes(JOB_FILE, content)
    with pytest.raises(UserError, match="tokenize.json cannot be read"):
        claim(storage, HERE)


def record(number, failed, retries=0):
    return ChunkRecord(number, f"{number:064x}", retries, (), {"k": "timeout"} if failed else {}, "", "", None, None)


def test_what_failed_is_tried_again_once_a_command(storage):
    records = Records(storage)
    for number, failed in enumerate((True, False, True)):
        records.write(record(number, failed))

    def finished():
        return records.finished([f"{number:064x}" for number in range(3)])

    first = finished()
    assert asked_for(storage) == frozenset() and ask_for_retry(storage, "slurm-7", first)
    assert asked_for(storage) == {first[0], first[2]}
    records.write(record(0, True, 1))  # tried again, in vain
    records.write(record(2, False, 1))
    assert not ask_for_retry(storage, "slurm-7", finished())  # a task of the array that starts later
    assert asked_for(storage).isdisjoint(finished())
    assert ask_for_retry(storage, "slurm-8", finished())
    assert asked_for(storage).intersection(finished()) == {finished()[0]}


def missing(number, path, reason, member=None):
    line = {"line": number, "id": "", "path": str(path), "member": member, "key": "", "reason": reason, "detail": ""}
    return replace(record(number, False), bad=(line,))


def test_what_has_come_back_is_looked_for_once_a_command(storage, tmp_path, monkeypatch):
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        tar.add(__file__, "here.mp4")
    for name in ("back.mp4", "readable.mp4"):
        (tmp_path / name).write_bytes(b"clip")
    (tmp_path / "folder.mp4").mkdir()
    records = Records(storage)
    made = [missing(0, tmp_path / "back.mp4", "missing"), missing(1, tmp_path / "gone.mp4", "missing"),
            missing(2, tmp_path / "readable.mp4", "unreadable"), missing(3, tmp_path / "folder.mp4", "unreadable"),
            missing(4, tmp_path / "clips.tar", "missing", "here.mp4"), missing(5, "a\0b", "unreadable"),
            missing(6, tmp_path / "clips.tar", "missing", "absent.mp4"), record(7, True)]
    for each in made:
        records.write(each)
    with Leases(storage, 60) as leases:
        ask_for_returned(storage, "slurm-7", records, records.all(), leases)
        assert asked_for(storage) == {made[number].name for number in (0, 2, 4)}
        (tmp_path / "gone.mp4").write_bytes(b"clip")
        reads = []
        monkeypatch.setattr(records, "read", lambda name: reads.append(name))
        ask_for_returned(storage, "slurm-7", records, records.all(), leases)  # a task that starts later
        assert not reads
        monkeypatch.undo()
        ask_for_returned(storage, "slurm-8", records, records.all(), leases)
        assert made[1].name in asked_for(storage) and not leases.claimed()


def test_the_processes_of_a_command_wait_for_the_one_that_looks(storage, monkeypatch):
    records = Records(storage)
    records.write(missing(0, "/nowhere.mp4", "missing"))
    with Leases(storage, 60) as mine, Leases(storage, 60) as others:
        assert others.claim(retries.LEASE)
        done = f"{FOLDER}slurm-7-returned.json"
        monkeypatch.setattr(retries.time, "sleep", lambda _: storage.write_bytes(done, b'{"records": ["x"]}'))
        ask_for_returned(storage, "slurm-7", records, records.all(), mine)
    assert asked_for(storage) == {"x"}


def test_where_nothing_was_missing_nothing_is_looked_for(storage):
    ask_for_returned(storage, "slurm-7", Records(storage), [record(0, True).name], None)
    assert not storage.names(FOLDER)


def test_a_tar_that_may_be_read_keeps_its_name_for_itself(storage, tmp_path):
    claim(storage, HERE)
    job = opened(storage, tmp_path)
    first = job.shard_name("video", 12, "a", 0, lambda name: False)
    again, twice = (job.shard_name("video", 12, "a", attempt, lambda name: False) for attempt in (1, 2))
    assert first == "video-000012.tar" and len({first, again, twice}) == 3
    assert job.shard_name("video", 12, "a", 0, {first}.__contains__) == again
    assert job.shard_name("video", 12, "a", 0, {first, again}.__contains__) == twice
    assert job.shard_name("video", 12, "b", 1, lambda name: False) != again


def test_states_that_are_published_meanwhile_are_seen(tmp_path, caplog):
    write_tokens(tmp_path, range(1))
    (tmp_path / "dataset.json").rename(tmp_path / "aside.json")
    published = PublishedTars(Storage.of(tmp_path))
    (tar,) = (path.name for path in tmp_path.glob("video-*.tar"))
    assert not published.refer_to(tar)
    (tmp_path / "aside.json").rename(tmp_path / "dataset.json")
    assert published.refer_to(tar) and not published.refer_to("video-000077.tar")
    (tmp_path / "video-000099.tar").write_bytes(b"a killed worker's")
    assert not published.refer_to("video-000099.tar")
    os.truncate(tmp_path / tar, 100)
    assert not published.refer_to(tar)  # it may come back under its name
    (state,) = (tmp_path / "index").glob("snapshot-*.parquet")
    state.write_bytes(b"damaged")
    assert not PublishedTars(Storage.of(tmp_path)).refer_to(tar) and "cannot be read" in caplog.text


def test_a_list_that_cannot_be_read_asks_for_nothing_and_says_so(storage, caplog):
    storage.write_bytes(f"{FOLDER}a.json", b"{")
    assert asked_for(storage) == frozenset() and "give --retry-quarantined again" in caplog.text

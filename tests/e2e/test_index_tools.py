"""index build, repair, merge and gc on real datasets, through their command line."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from grn_scale.data.dataset import Dataset
from grn_scale.data.dataset_info import read_dataset_info, snapshot_name, snapshots, write_dataset
from grn_scale.data_pipeline.index import main
from grn_scale.data_pipeline.index_repair import repair
from grn_scale.data_pipeline.verify import find_damage
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import LocalStorage, Storage
from tests.helpers.mutations import flip, other_digit, replace_all, replace_some
from tests.helpers.token_dataset import write_tokens
from tests.helpers.tokenize_setup import captions_of, content, flip_byte, stamps


def part(folder: Path, family: str, shard: int) -> Path:
    info = read_dataset_info(folder)
    return folder / "index" / (info.video_shards if family == "video" else info.text_shards)[shard].part


def report(capsys, *argv, code: int = 0) -> dict:
    assert main([*map(str, argv), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def age(folder: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


class Killed(BaseException):
    pass


@contextmanager
def killed_at(moment: int):
    """Ends what runs in the block as a kill would, before it changes a file for the `moment`th time (from 0)."""
    changes = itertools.count()

    def counted(change):
        def counting(*arguments):
            if next(changes) == moment:
                raise Killed
            return change(*arguments)
        return counting

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((LocalStorage, "write"), (LocalStorage, "write_bytes"), (LocalStorage, "create"),
                            (LocalStorage, "delete"), (os, "link")):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        yield


# build

def test_build_writes_the_same_index_again(made, copied, capsys):
    (copied / "dataset.json").unlink()
    for path in (copied / "index").glob("snapshot-*"):
        path.unlink()
    found = report(capsys, "build", copied)
    assert found["samples"] == 8 and content(copied) == content(made)


def test_build_refuses_what_is_unfinished_or_foreign(prepared, copied, tmp_path):
    (copied / "video-000001.tar").unlink()
    with pytest.raises(UserError, match="video-000001.tar is missing.*index repair"):
        main(["build", str(copied)])
    for record in (copied / "chunks").glob("000001-*"):
        record.unlink()
    with pytest.raises(UserError, match="1 of 3 chunks are not finished"):
        main(["build", str(copied)])
    with pytest.raises(ConfigError, match="no config.yaml"):
        main(["build", str(tmp_path)])


# repair

def test_a_sound_dataset_needs_no_repair(copied, capsys):
    before = content(copied)
    assert report(capsys, "repair", copied) == {
        "dataset": str(copied), "dry_run": False, "done": [], "to_make": [], "beyond": []}
    assert content(copied) == before


def test_text_parts_are_made_again_from_their_tars_alone(made, copied, capsys):
    part(copied, "text", 0).unlink()
    flip_byte(part(copied, "text", 2), 60)
    found = report(capsys, "repair", copied)
    assert found["to_make"] == found["beyond"] == [] and content(copied) == content(made)


def test_a_lost_video_part_costs_no_encoding(prepared, made, copied, capsys):
    flip_byte(part(copied, "video", 0), 60)
    part(copied, "video", 1).unlink()
    before = stamps(copied, "*.tar")
    found = report(capsys, "repair", copied)
    assert [line.partition(":")[0] for line in found["to_make"]] == ["video-000000.tar", "video-000001.tar"]
    prepared.run(str(copied))
    assert stamps(copied, "*.tar") == before and not list(find_damage(copied))
    assert read_dataset_info(copied) == read_dataset_info(made) and captions_of(copied) == captions_of(made)
    assert main(["gc", str(copied), "--older-than", "0"]) == 0
    assert content(copied) == content(made)


@pytest.mark.parametrize("damage", [
    lambda path: flip_byte(path, 2000), lambda path: os.truncate(path, 3000), Path.unlink])
@pytest.mark.parametrize("name", ["video-000001.tar", "text-000000.tar"])
def test_a_damaged_tar_is_made_again_and_others_are_kept(prepared, made, copied, capsys, damage, name):
    damage(copied / name)
    before, kept = tars(copied), stamps(copied, "*.tar")
    kept.pop(name, None)
    found = report(capsys, "repair", copied)
    assert tars(copied) == before and [line.partition(":")[0] for line in found["to_make"]] == [name]
    prepared.run(str(copied))
    assert kept.items() <= stamps(copied, "*.tar").items()
    dataset = Dataset.open(copied)
    assert captions_of(copied) == captions_of(made) and dataset.info.samples == 8
    age(copied, 100)
    assert main(["gc", str(copied)]) == 0
    assert not list(find_damage(copied))


def test_damaged_records_and_sums_are_mended(prepared, made, copied, capsys):
    first, second, third = sorted((copied / "chunks").iterdir())
    first.write_text("garbage")
    values = json.loads(second.read_text())
    values["video"]["tokens"] += 1
    values["text"]["sha256"] = "0" * 64
    second.write_text(json.dumps(values, sort_keys=True, indent=1))
    found = report(capsys, "repair", copied)
    assert found["beyond"] == [] and len(found["to_make"]) == 1
    assert second.read_bytes() == (made / "chunks" / second.name).read_bytes()
    prepared.run(str(copied))
    assert captions_of(copied) == captions_of(made) and not list(find_damage(copied))


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_file_of_the_job_is_refused_or_costs_work_and_nothing_else(prepared, made, copied, seed):
    for number in range(20 * seed, 20 * seed + 20):
        draw = random.Random(number)
        path = draw.choice([*sorted((copied / "chunks").iterdir()), *sorted((copied / "sources").iterdir()),
                            copied / "manifest.json", copied / "dataset.json"])
        before = path.read_bytes()
        path.write_bytes(draw.choice((flip, replace_some, other_digit, replace_all))(draw, before, []))
        try:
            repair(Storage.of(copied), dry_run=True)
        except UserError:
            pass
        if number % 20 < 19:
            path.write_bytes(before)
    # The last one stays.
    repair(Storage.of(copied))
    prepared.run(str(copied))
    assert not list(find_damage(copied)) and captions_of(copied) == captions_of(made)


def test_a_dry_run_changes_nothing(copied, capsys):
    part(copied, "text", 0).unlink()
    flip_byte(part(copied, "video", 1), 60)
    os.truncate(copied / "video-000002.tar", 100)
    before = content(copied)
    found = report(capsys, "repair", copied, "--dry-run")
    assert content(copied) == before and len(found["to_make"]) == 2
    assert main(["repair", str(copied), "--dry-run"]) == 0
    assert "would be done: video-000001.tar: gets an index part" in capsys.readouterr().out


def test_a_repair_may_be_killed_at_any_moment(prepared, made, copied, tmp_path):
    flip_byte(copied / "video-000000.tar", 2000)
    flip_byte(part(copied, "video", 1), 60)
    part(copied, "text", 1).unlink()
    flip_byte(copied / "text-000002.tar", 600)
    for moment in itertools.count():
        folder = Path(shutil.copytree(copied, tmp_path / f"killed-{moment}"))
        try:
            with killed_at(moment):
                repair(Storage.of(folder))
            break
        except Killed:
            assert Dataset.open(folder, check_files=False).info == read_dataset_info(made)
            repair(Storage.of(folder))
            left = repair(Storage.of(folder))
            assert left.beyond == []
            shutil.rmtree(folder) if moment % 4 else prepared.run(str(folder))
            assert moment % 4 or captions_of(folder) == captions_of(made) and not list(find_damage(folder))
    assert moment > 5


def test_without_records_texts_are_mended_and_the_rest_is_named(tmp_path, capsys):
    write_tokens(tmp_path, range(2))
    part(tmp_path, "text", 1).unlink()
    flip_byte(tmp_path / "video-000000.tar", 600)
    found = report(capsys, "repair", tmp_path, code=1)
    assert found["to_make"] == [] and [line.partition(":")[0] for line in found["beyond"]] == ["video-000000.tar"]
    assert part(tmp_path, "text", 1).exists()
    with pytest.raises(UserError, match="no tokenized dataset"):
        main(["repair", str(tmp_path / "absent")])


# merge

@pytest.fixture
def two(tmp_path):
    """Two datasets; samples 16 to 31 are in both."""
    write_tokens(tmp_path / "a", (0, 1))
    write_tokens(tmp_path / "b", (0,), name="other")
    write_tokens(tmp_path / "b", (1,))
    return tmp_path / "a", tmp_path / "b"


def test_merged_datasets_read_as_one_and_leave_their_sources_alone(two, tmp_path, capsys):
    before = [content(folder) for folder in two]
    found = report(capsys, "merge", *two, "--output", tmp_path / "c")
    assert found["samples"] == 48 and found["clips_that_stood_twice"] == 16
    assert found["linked_shards"] == 7 and found["copied_shards"] == 0  # the one that holds nothing new is left out
    assert [content(folder) for folder in two] == before and not list(find_damage(tmp_path / "c"))
    merged = Dataset.open(tmp_path / "c")
    rows = {row.key: row for number in range(48) for row in [merged.locate(number)]}
    for folder in two:
        dataset = Dataset.open(folder)
        for number in range(dataset.info.samples):
            row = dataset.locate(number)
            assert (merged.read_bits(rows[row.key]) == dataset.read_bits(row)).all()
            (caption,) = row.captions
            (kept,) = rows[row.key].captions
            assert (merged.read_text(kept.texts["T2V"]) == dataset.read_text(caption.texts["T2V"])).all()
    merged.read_text(merged.info.empty_text)
    assert (tmp_path / "c/video-000000.tar").samefile(two[0] / "video-000000.tar")


def test_a_merge_of_copies_to_a_url_is_the_same_dataset(two, tmp_path, capsys):
    report(capsys, "merge", *two, "--output", tmp_path / "c")
    found = report(capsys, "merge", *two, "--output", tmp_path / "d", "--copy")
    assert found["copied_shards"] == 7
    url = f"memory://{tmp_path.name}/merged"
    report(capsys, "merge", *two, "--output", url)
    snapshots_found = {read_dataset_info(folder).snapshot for folder in (tmp_path / "c", tmp_path / "d", url)}
    assert len(snapshots_found) == 1 and not list(find_damage(url))


def test_a_merge_may_be_killed_at_any_moment_and_goes_on(two, tmp_path, capsys):
    command = ["merge", *map(str, two), "--output"]
    for moment in itertools.count(step=3):
        output = tmp_path / f"killed-{moment}"
        try:
            with killed_at(moment):
                main([*command, str(output)])
            break
        except Killed:
            assert not (output / "dataset.json").exists()
            assert main([*command, str(output)]) == 0
            assert moment % 2 or not list(find_damage(output))
    assert moment > 15
    with pytest.raises(UserError, match="finished already"):
        main([*command, str(output)])
    with pytest.raises(UserError, match="another merge"):
        main(["merge", str(two[0]), str(two[0]), "--output", str(output)])


def test_what_cannot_be_merged_is_refused(two, tmp_path):
    write_tokens(tmp_path / "other", (0,), tokenizer_fingerprint="elsewhere", task_tags=True)
    with pytest.raises(UserError, match="tokenizer_fingerprint tokenizer and elsewhere; task_tags False and True"):
        main(["merge", str(two[0]), str(tmp_path / "other"), "--output", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="is not empty"):
        main(["merge", *map(str, two), "--output", str(two[0])])
    with pytest.raises(ConfigError, match="two or more"):
        main(["merge", str(two[0]), "--output", str(tmp_path / "c")])
    flip_byte(two[1] / "video-000000.tar", 600)
    with pytest.raises(UserError, match="video-000000.tar is damaged"):
        main(["merge", *map(str, two), "--output", str(tmp_path / "d"), "--copy"])
    assert not (tmp_path / "d/dataset.json").exists()
    (two[1] / "video-000000.tar").unlink()
    with pytest.raises(UserError, match="video-000000.tar is missing"):
        main(["merge", *map(str, two), "--output", str(tmp_path / "d")])


# gc

def test_gc_keeps_what_the_kept_snapshots_need_and_nothing_else(tmp_path, capsys):
    for shard in range(3):
        write_tokens(tmp_path, (shard,))
        age(tmp_path, 30)
    # A state that lacks the first shard: its tar is needed by older ones only.
    info = read_dataset_info(tmp_path)
    write_dataset(tmp_path, replace(info, video_shards=info.video_shards[1:]))
    for name in ("notes.txt", "video-000009.tar.part", "index/mine.parquet", "video-1.tar"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "video-000007.tar.host-12-0.partial").write_text("left")
    age(tmp_path, 30)
    os.utime(tmp_path / snapshot_name(read_dataset_info(tmp_path).snapshot))
    (tmp_path / "video-000008.tar").write_text("young")
    before = content(tmp_path)
    dry = report(capsys, "gc", tmp_path, "--keep", "1", "--dry-run")
    assert content(tmp_path) == before
    assert report(capsys, "gc", tmp_path, "--keep", "1") == {**dry, "dry_run": False}
    gone = before.keys() - content(tmp_path).keys()
    assert {removal["name"] for removal in dry["removed"]} == gone
    assert dry["bytes"] == sum(len(before[name]) for name in gone)
    assert gone == {"video-000000.tar", "video-000007.tar.host-12-0.partial",
                    f"index/{info.video_shards[0].part}"} | {
        name for name in before if "snapshot-" in name and name != snapshot_name(read_dataset_info(tmp_path).snapshot)}
    assert not list(find_damage(tmp_path)) and Dataset.open(tmp_path).info.samples == 32
    assert report(capsys, "gc", tmp_path)["removed"] == []


def test_gc_may_be_killed_at_any_moment(tmp_path):
    for shard in range(2):
        write_tokens(tmp_path / "all", (shard,))
    info = read_dataset_info(tmp_path / "all")
    write_dataset(tmp_path / "all", replace(info, video_shards=info.video_shards[1:]))
    age(tmp_path / "all", 30)
    for moment in itertools.count():
        folder = Path(shutil.copytree(tmp_path / "all", tmp_path / f"killed-{moment}"))
        try:
            with killed_at(moment):
                main(["gc", str(folder)])
            break
        except Killed:
            assert not list(find_damage(folder))
            assert main(["gc", str(folder)]) == 0
            assert len(list(folder.glob("*.tar"))) == 3 and not list(find_damage(folder))
    assert moment == 4  # two snapshots, a part and a tar


def test_gc_keeps_as_many_snapshots_as_it_is_told(tmp_path, capsys):
    for shard in range(4):
        write_tokens(tmp_path, (shard,))
        os.utime(tmp_path / snapshot_name(read_dataset_info(tmp_path).snapshot), (shard + 1, shard + 1))
    names = sorted(snapshots(tmp_path), key=lambda name: (tmp_path / snapshot_name(name)).stat().st_mtime)
    assert report(capsys, "gc", tmp_path, "--keep", "3")["removed"][0]["name"] == snapshot_name(names[0])
    for name in names[1:]:
        assert Dataset.open(tmp_path, name).info.samples > 0


def test_gc_leaves_finished_chunks_of_an_unfinished_run_and_drops_those_the_manifest_lost(prepared, copied, capsys):
    (copied / "dataset.json").unlink()
    for path in (copied / "index").glob("snapshot-*"):
        path.unlink()
    age(copied, 30)
    before = content(copied)
    assert report(capsys, "gc", copied)["removed"] == [] and content(copied) == before
    prepared.run(str(copied), prepared.lines[:3])
    age(copied, 30)
    assert main(["gc", str(copied)]) == 0
    assert sorted(path.name for path in copied.glob("*.tar")) == ["text-000000.tar", "video-000000.tar"]
    assert len(list((copied / "chunks").iterdir())) == len(list((copied / "sources").iterdir())) == 1
    assert not list(find_damage(copied))


def test_gc_refuses_what_it_cannot_judge(copied, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not made by grn-scale"):
        main(["gc", str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="local folders"):
        main(["gc", "memory://tokens"])
    with pytest.raises(ConfigError, match="at least 1"):
        main(["gc", str(copied), "--keep", "0"])
    (copied / "dataset.json").write_text("{}")
    before = content(copied)
    with pytest.raises(UserError, match="format version"):
        main(["gc", str(copied), "--older-than", "0"])
    assert content(copied) == before


def test_gc_says_what_it_frees_of_linked_tars(two, tmp_path, capsys):
    main(["merge", *map(str, two), "--output", str(tmp_path / "c")])
    shutil.copytree(tmp_path / "c", tmp_path / "e", copy_function=os.link)
    os.link(two[0] / "video-000000.tar", tmp_path / "e/video-000099.tar")
    age(tmp_path / "e", 30)
    capsys.readouterr()
    removed = {removal["name"]: removal["bytes"] for removal in report(capsys, "gc", tmp_path / "e")["removed"]}
    assert removed["video-000099.tar"] == 0

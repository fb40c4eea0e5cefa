"""Damaged index parts in training: that of a text shard costs samples, that of a video shard ends the run."""

from __future__ import annotations

import errno
import shutil

import pytest

from grn_scale import storage as storage_module
from grn_scale.data import loader
from grn_scale.data.dataset import Dataset
from grn_scale.data.loader import PackLoader
from grn_scale.data.packing import Cost
from grn_scale.data.plan import Plan
from grn_scale.data_pipeline.index_repair import repair
from grn_scale.errors import DoNotRequeue, UserError
from grn_scale.storage import LocalStorage, Storage
from tests.helpers.dataset import flip_byte, part_of
from tests.helpers.token_dataset import write_tokens

SHARDS = 3
KINDS = ("bf16", "none")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for kind in KINDS:
        write_tokens(folder / kind, range(SHARDS), kind=kind)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written / "bf16", tmp_path / "tokens")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def take(dataset, count=4):
    plan = Plan(dataset, seed=3, token_budget=128, caption_drop=0.2, window_shards=SHARDS)
    with PackLoader(plan, plan.start(), packs_per_step=4, cost=Cost(100, 1), gamma=0.5) as steps:
        return [next(steps) for _ in range(count)]


def samples_of(steps):
    return [sample for step in steps for micro_batch in step.micro_batches for sample in micro_batch.samples]


def text_shard_of(dataset, draw):
    return loader.text_of(dataset, dataset.locate(draw.row), draw).shard


def truncate(part):
    part.write_bytes(part.read_bytes()[:-9])


def empty(part):
    part.write_bytes(b"")


@pytest.mark.parametrize(("kind", "damage"), [("bf16", lambda part: flip_byte(part, 40)), ("bf16", empty),
                                              ("none", truncate)])
def test_a_damaged_text_part_makes_the_samples_with_its_texts_bad(written, tmp_path, kind, damage, caplog):
    folder = shutil.copytree(written / kind, tmp_path / "tokens")
    healthy = take(Dataset.open(folder))
    damage(part_of(folder, "text-000001"))
    steps = take(Dataset.open(folder))
    assert [step.packs for step in steps] == [step.packs for step in healthy]
    assert [step.weights for step in steps] == [step.weights for step in healthy]
    dataset = Dataset.open(folder)
    of_part = [s for s in samples_of(steps) if text_shard_of(dataset, s.draw) == "text-000001.tar"]
    assert of_part and all(not s.valid and not s.bits.any() for s in of_part)
    assert sum(s.valid for s in samples_of(steps)) == len(samples_of(steps)) - len(of_part) > 0
    bad = [b for step in steps for b in step.bad]
    assert [b.key for b in bad] == [s.draw.key for s in of_part]
    assert {(b.shard, b.unreadable) for b in bad} == {("text-000001.tar", False)}
    assert "index/text-000001-" in bad[0].reason and "damaged" in bad[0].reason and "index repair" in bad[0].reason
    assert bad[0].key in caplog.text and steps[-1].state_after.skip == ()


def test_samples_are_good_again_once_the_text_part_is_repaired(folder):
    dataset = Dataset.open(folder)
    flip_byte(part_of(folder, "text-000001"), 40)
    assert not all(s.valid for s in samples_of(take(dataset)))
    assert repair(Storage.of(folder)).beyond == []
    assert all(s.valid for s in samples_of(take(dataset)))


def test_a_text_part_that_cannot_be_read_puts_its_samples_on_the_skip_list(folder):
    part_of(folder, "text-000001").unlink()
    dataset = Dataset.open(folder, check_files=False)
    steps = take(dataset)
    bad = [b for step in steps for b in step.bad]
    assert bad and {(b.shard, b.unreadable) for b in bad} == {("text-000001.tar", True)}
    assert "No such file" in bad[0].reason and "index/text-000001-" in bad[0].reason
    assert steps[-1].state_after.skip == tuple(sorted({b.key for b in bad}))
    invalid = [s.draw for s in samples_of(steps) if not s.valid]
    assert {draw.key for draw in invalid} == {b.key for b in bad}
    assert "text-000001.tar" in {text_shard_of(dataset, draw) for draw in invalid}


class Failing(LocalStorage):
    """Storage whose reads of parts fail, or come out cut short, a number of times."""

    fails = short = 0
    family = "video"

    def path(self, name):
        if f"index/{self.family}" in name and self.fails:
            self.fails -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().path(name)

    def read(self, name):
        data = super().read(name)
        if f"index/{self.family}" in name and self.short:
            self.short -= 1
            return data[:-1]
        return data


def test_a_damaged_video_part_ends_the_run_for_good_and_says_what_to_do(folder):
    flip_byte(part_of(folder, "video-000002"), 40)
    message = "video-000002-.*parquet is damaged.*grn-scale index repair.*grn-scale verify"
    with pytest.raises(DoNotRequeue, match=message):
        take(Dataset.open(folder))


def test_a_video_part_that_is_damaged_behind_the_first_window_ends_the_run_when_it_is_reached(folder):
    dataset = Dataset.open(folder)
    plan = Plan(dataset, seed=3, token_budget=128, window_shards=1)
    with PackLoader(plan, plan.start(), packs_per_step=1, cost=Cost(100, 1), gamma=0.5, prefetch=0) as steps:
        first = next(steps)
        read = dataset.locate(first.packs[0].draws[0].row).shard
        for shard in {0, 1, 2} - {read}:
            truncate(part_of(folder, f"video-{shard:06d}"))
        with pytest.raises(DoNotRequeue, match="is damaged"):
            list(steps)


def test_hiccups_of_the_storage_do_not_end_the_run_and_an_outage_does_without_blaming_the_data(folder):
    storage = Failing(folder)
    info = Dataset.open(folder).info
    for fails, short in ((3, 0), (0, 1)):
        storage.fails, storage.short = fails, short
        assert all(s.valid for s in samples_of(take(Dataset(storage, info))))
    storage.fails = 4
    with pytest.raises(UserError, match="cannot be read: Input/output error; look at the storage") as caught:
        take(Dataset(storage, info))
    assert not isinstance(caught.value, DoNotRequeue)


def test_a_text_part_that_arrives_damaged_once_costs_no_sample(folder):
    storage, info = Failing(folder), Dataset.open(folder).info
    storage.family, storage.short = "text", 1
    assert all(s.valid for s in samples_of(take(Dataset(storage, info)))) and not storage.short

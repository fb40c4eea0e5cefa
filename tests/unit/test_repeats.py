"""Clips that stand in several shards, against a plain account of what the index must then hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pyarrow as pa
import pytest

from grn_scale.data.dataset_info import write_dataset
from grn_scale.data.index_parts import VIDEO_SCHEMA, read_table, read_video_part, write_video_part, write_video_table
from grn_scale.data.schema import Caption, IndexRow, ShardInfo, TextRef
from grn_scale.data_pipeline.index_merge import merge
from grn_scale.data_pipeline.repeats import without_repeats
from grn_scale.errors import UserError
from tests.helpers.token_dataset import write_tokens

EMPTY_TOKENS = 3


def random_rows(rng: random.Random, keys: list[str]) -> list[IndexRow]:
    def caption() -> Caption:
        tasks = rng.sample(("T2I", "T2V", "I2V"), rng.choice((0, 1, 3)))
        return Caption(rng.choice(("", "long", "a:b,c-1", "kürz")), {
            task: TextRef(f"text{rng.randrange(3)}", rng.randrange(1, 60), f"text-{rng.randrange(2):06d}.tar")
            for task in tasks})

    return [IndexRow(0, i, key, rng.getrandbits(40), rng.getrandbits(20), rng.getrandbits(64),
                     (rng.choice((1, 3)), 4, 5), rng.random(),
                     tuple(caption() for _ in range(rng.choice((0, 1, 2, 4)))), rng.choice((None, 7)))
            for i, key in enumerate(keys)]


def identity(caption: Caption) -> tuple:
    return caption.type, tuple(sorted((task, ref.key) for task, ref in caption.texts.items()))


def plain(shards: list[list[IndexRow]]) -> list[list[IndexRow]]:
    """Rows that each shard keeps."""
    seen: dict[str, dict] = {}
    for row in (row for rows in shards for row in rows):
        for caption in row.captions:
            seen.setdefault(row.key, {}).setdefault(identity(caption), caption)
    kept, done = [], set()
    for rows in shards:
        kept.append([replace(row, row=0, captions=tuple(seen.get(row.key, {}).values()))
                     for row in rows if row.key not in done])
        done |= {row.key for row in rows}
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_each_clip_is_kept_at_its_first_place_with_the_captions_of_all(tmp_path, seed):
    rng = random.Random(seed)
    name = (lambda n: f"{n:032x}") if seed % 2 else (lambda n: f"clip-{n}")
    shards = [random_rows(rng, [name(n) for n in rng.sample(range(20), rng.randrange(1, 12))]) for _ in range(5)]
    shards.append(random_rows(rng, [row.key for row in shards[0]]))  # of which nothing is left
    infos = [write_video_part(tmp_path, ShardInfo(f"video-{n:06d}.tar", len(rows), 0, ""), rows, EMPTY_TOKENS)
             for n, rows in enumerate(shards)]
    result, repeated = without_repeats(tmp_path, infos, EMPTY_TOKENS)
    keys = [row.key for rows in shards for row in rows]
    assert repeated == sum(keys.count(key) > 1 for key in set(keys))
    expected = {info.name: rows for info, rows in zip(infos, plain(shards)) if rows}
    assert [info.name for info in result] == list(expected)
    for info in result:
        rows = [replace(row, row=0) for row in read_video_part(tmp_path, info, 0, 0)]
        assert rows == expected[info.name]
        # The sums, and every byte of the part, are those of its rows written one by one.
        assert write_video_part(tmp_path / "again", replace(info, samples=len(rows)), rows, EMPTY_TOKENS) == info


def test_shards_without_repeats_stay_as_they_are(tmp_path):
    infos = [write_video_part(tmp_path, ShardInfo(f"video-{n:06d}.tar", 3, 0, ""),
                              random_rows(random.Random(n), [f"{n}-{i}" for i in range(3)])) for n in range(2)]
    assert without_repeats(tmp_path, infos, EMPTY_TOKENS) == (infos, 0)
    assert without_repeats(tmp_path, [], EMPTY_TOKENS) == ([], 0)


def test_a_table_that_was_read_is_written_as_the_same_bytes(tmp_path):
    rows = random_rows(random.Random(0), [f"clip-{i}" for i in range(30)])
    info = write_video_part(tmp_path, ShardInfo("video-000000.tar", 30, 0, ""), rows, EMPTY_TOKENS)
    table = read_table(tmp_path, info, VIDEO_SCHEMA)
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    for each in (table, chunked):
        assert write_video_table(tmp_path, replace(info, part="", part_sha256=""), each, EMPTY_TOKENS) == info
    with pytest.raises(ValueError, match="30 samples, but the part 7 rows"):
        write_video_table(tmp_path, info, table.slice(0, 7))


def test_a_merge_names_the_sample_whose_text_shard_is_unknown(tmp_path):
    info = write_tokens(tmp_path / "a", (0, 1))
    write_tokens(tmp_path / "b", (0,), name="other")
    rows = read_video_part(tmp_path / "a", info.video_shards[0], 0, 0)
    stray = TextRef("text", 2, "text-000007.tar")
    rows[5] = replace(rows[5], captions=(*rows[5].captions, Caption("", {"T2V": stray})))
    shard = write_video_part(tmp_path / "a", info.video_shards[0], rows, info.empty_text.tokens)
    write_dataset(tmp_path / "a", replace(info, video_shards=(shard, *info.video_shards[1:])))
    with pytest.raises(UserError, match=f"sample {rows[5].key} needs the text shard 'text-000007.tar'"):
        merge([str(tmp_path / "b"), str(tmp_path / "a")], str(tmp_path / "c"))
    assert not (tmp_path / "c/dataset.json").exists()

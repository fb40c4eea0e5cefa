"""Sizes of text shards before they are made, and what `text.states=auto` makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grn_scale.config.data_schema import TextConfig
from grn_scale.data.shard_writer import write_shard
from grn_scale.data.text_payload import pack_states
from grn_scale.data_pipeline.estimate import estimate_texts
from grn_scale.demo.text_encoder import build_text_encoder
from grn_scale.errors import ConfigError
from grn_scale.tokenizer.text import load_text_encoder, text_key, texts_of

CLIPS = [[("short", f"clip {n}"), ("long", f"a long caption of clip number {n} with more words")] for n in range(40)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "built"
    return load_text_encoder(build_text_encoder([text for clip in CLIPS for _, text in clip], folder), max_tokens=64)


@pytest.mark.parametrize("task_tags", [False, True])
def test_the_whole_manifest_as_its_sample_gives_the_sizes_of_the_shards(encoder, tmp_path, task_tags):
    found = estimate_texts(CLIPS, len(CLIPS), encoder.tokenizer, task_tags)
    texts = ["", *(text for clip in CLIPS for text in texts_of((text for _, text in clip), 2, task_tags))]
    assert found.entries == len(texts) == 1 + 2 * 40 * (1 + task_tags)
    assert found.tokens == sum(len(encoder.token_ids(text)) for text in texts)
    states = encoder.encode(texts)
    for form, size in found.bytes.items():
        with write_shard(tmp_path / f"{form}.tar") as writer:
            for text, entry in zip(texts, states):
                payload = None if form == "none" else pack_states(entry, form)
                writer.add_text(text_key(text, ""), encoder.token_ids(text), payload)
        assert size == (tmp_path / f"{form}.tar").stat().st_size - 1024, "all but the end of the tar"


def test_a_sample_is_scaled_to_all_lines(encoder):
    whole = estimate_texts(CLIPS, 40, encoder.tokenizer, True)
    part = estimate_texts(CLIPS[::4], 40, encoder.tokenizer, True)
    assert part.entries == whole.entries
    assert part.tokens == pytest.approx(whole.tokens, rel=0.05)
    assert all(part.bytes[form] == pytest.approx(whole.bytes[form], rel=0.05) for form in whole.bytes)
    large = estimate_texts(CLIPS, 10**8, encoder.tokenizer, True)
    assert large.entries == 1 + 4 * 10**8


def test_captions_that_clips_share_and_empty_ones_count_once(encoder):
    shared = [[("", "the same")], [("", " the  same ")], [("", "")], []]
    found = estimate_texts(shared, 4, encoder.tokenizer, False)
    assert found.entries == 2
    assert estimate_texts([], 0, encoder.tokenizer, False).entries == 1, "the empty caption"


def test_auto_keeps_bf16_below_the_limit_and_ids_from_there_on(encoder):
    found = replace(estimate_texts(CLIPS, 40, encoder.tokenizer, True), bytes={"none": 1, "bf16": 2 * 10**9, "int8": 1})
    assert found.chosen(TextConfig()) == "bf16"
    assert found.chosen(TextConfig(states_limit_gigabytes=2.1)) == "bf16"
    assert found.chosen(TextConfig(states_limit_gigabytes=2.0)) == "none"
    assert found.chosen(TextConfig(states="int8", states_limit_gigabytes=0.1)) == "int8"
    line = found.describe(TextConfig(states_limit_gigabytes=1.0))
    assert "161 entries" in line and "2 GB with bf16" in line and "keeps none" in line


@pytest.mark.parametrize("setting, message", [
    ({"states": "fp8"}, "text.states is 'fp8'"), ({"states_limit_gigabytes": 0}, "states_limit_gigabytes is 0")])
def test_settings_that_mean_nothing_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**setting)

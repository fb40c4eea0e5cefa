"""Cleaning, tags and the text encoder: its folder, its token ids, its states."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from grn_scale.batch import TASKS
from grn_scale.config.data_schema import MOST_TEXT_TOKENS
from grn_scale.demo.text_encoder import HIDDEN_SIZE, build_text_encoder
from grn_scale.errors import UserError
from grn_scale.model.rope import LEVEL_TIME
from grn_scale.tokenizer.text import clean_caption, load_text_encoder, tagged_caption, text_key

COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
CAPTIONS = [f"{size} {color} circle moving {way} on black"
            for size in ("small", "large") for color in COLORS for way in ("left", "right", "up", "down")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_text_encoder(CAPTIONS, tmp_path_factory.mktemp("encoder") / "built")


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder, max_tokens=64)


@pytest.mark.parametrize("raw, clean", [
    ("  a\tred \n circle ", "a red circle"),
    ("cats &amp;amp; dogs", "cats & dogs"),
    ("it&#39;s", "it's"),
    ("schÃ¶n", "schön"),
    ("&nbsp;", ""),
])
def test_cleaning_repairs_unicode_unescapes_twice_and_collapses_space(raw, clean):
    assert clean_caption(raw) == clean


@pytest.mark.parametrize("raw, clean", [
    ("\u201cx\u201d \u2014 l\u2019\u00e9t\u00e9", '"x" \u2014 l\'\u00e9t\u00e9'),  # straight quotes; a dash stays
    ("\ufb01ne \uff21\uff22", "fine AB"),  # ligatures and full-width letters
    ("e\u0301", "\u00e9"),  # composed
    ("\ufeffa\x00\x1b[31mred", "ared"),  # byte-order mark, control characters, terminal colours
    ("\ud83d\ude00", "\U0001f600"),  # surrogates put together
    ("&lt;b&gt; &amp;lt;i&amp;gt;", "<b> <i>"),
    ("&copy 2020 &#x1F600; &nosuch;", "\u00a9 2020 \U0001f600 &nosuch;"),
    ("a\u00a0b\u3000c\u2028d\u2003\r\ne", "a b c d e"),
    ("a\x85b\x1cc", "a\u2026bc"),  # white space to Unicode, but damage to the repair before
    ("a\u200bb", "a\u200bb"),  # of no width, but no white space
    ("", ""),
    (" \n\t ", ""),
])
def test_cleaning_as_the_text_encoder_was_trained_with(raw, clean):
    assert clean_caption(raw) == clean


def test_what_is_white_space_is_collapsed_after_the_repair():
    import ftfy

    spaces = [c for c in map(chr, range(0x3001)) if c.isspace()]
    assert len(spaces) == 29
    for c in spaces:
        raw = f" {c}a{c}{c}b{c}"
        assert clean_caption(raw) == re.sub(r"\s+", " ", ftfy.fix_text(raw)).strip()
    assert clean_caption("a&nbsp;&amp;#8195;b") == "a b"


def test_a_cleaned_caption_stays_as_it_is_and_a_tag_changes_nothing_in_it():
    for raw in (*CAPTIONS[:3], "  sch\u00c3\u00b6n &amp;amp; \u201ct\u00e4glich\u201d\n", "3 < 4 &lt; 5"):
        once = clean_caption(raw)
        assert clean_caption(once) == once
        assert clean_caption("<T2V>" + raw.lstrip()) == tagged_caption(once, "T2V", True)


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_tag_in_models_with_tags_only(task):
    assert tagged_caption("a cat", task, True) == f"<{task}>a cat"
    assert tagged_caption("a cat", task, False) == "a cat"
    assert tagged_caption("", task, True) == tagged_caption("", task, False) == ""


def test_a_tag_that_is_there_is_not_put_there_twice():
    assert tagged_caption("<T2V>a cat", "T2V", True) == "<T2V>a cat"
    assert tagged_caption("<T2V>a cat", "T2V", False) == "<T2V>a cat"
    assert tagged_caption("<T2I>a cat", "T2V", True) == "<T2V><T2I>a cat"


def test_the_tag_stands_directly_before_the_caption_and_the_empty_caption_has_none():
    assert tagged_caption("a cat", "T2V", True) == "<T2V>a cat"
    assert tagged_caption("a cat", "I2V", False) == "a cat"
    assert tagged_caption("", "T2I", True) == ""
    with pytest.raises(UserError, match="T2V"):
        tagged_caption("a cat", "V2V", True)


def test_a_text_key_depends_on_text_and_encoder():
    keys = {text_key("a", "x"), text_key("b", "x"), text_key("a", "y"), text_key("ax", "")}
    assert len(keys) == 4 and all(len(key) == 64 for key in keys)


def test_ids_end_with_the_end_token_also_when_cut(folder, encoder):
    assert encoder.token_ids("") == [1]
    ids = encoder.token_ids(CAPTIONS[0])
    assert ids[-1] == 1 and len(ids) == len(CAPTIONS[0].split()) + 1
    short = load_text_encoder(folder, max_tokens=4)
    assert short.token_ids(CAPTIONS[0]) == ids[:3] + [1]


def test_tags_and_caption_words_are_one_token_each(encoder):
    plain = encoder.token_ids(CAPTIONS[0])
    tagged = [encoder.token_ids(tagged_caption(CAPTIONS[0], task, True)) for task in ("T2I", "T2V", "I2V")]
    assert len({tuple(ids) for ids in tagged}) == 3
    # sentencepiece puts its space mark in front of the text, here in front of the tag
    assert all(len(ids) == len(plain) + 2 for ids in tagged)
    assert 2 not in {i for ids in tagged for i in ids}, "a word of the captions is unknown"
    assert 2 not in encoder.token_ids("purple dog, 3 times!"), "ASCII can be spelled"


def test_transformers_reads_the_folder_and_gives_the_same_ids(folder, encoder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in ("", CAPTIONS[0], "<T2V>" + CAPTIONS[1], "reddish dog <I2V>small"):
        assert tokenizer(text).input_ids == encoder.token_ids(text)


def test_states_are_bf16_of_the_true_length_and_do_not_depend_on_the_batch(encoder):
    texts = ["", *CAPTIONS[:9], "<T2V>" + CAPTIONS[3], CAPTIONS[2], "dog"]
    states = encoder.encode(texts, batch=4)
    for text, state in zip(texts, states):
        assert state.dtype == torch.bfloat16
        assert state.shape == (len(encoder.token_ids(text)), HIDDEN_SIZE)
        assert torch.isfinite(state).all()
        torch.testing.assert_close(state, encoder.encode([text])[0], rtol=1e-2, atol=1e-2)
    assert torch.equal(states[3], states[11])
    backwards = encoder.encode(texts[::-1], batch=4)[::-1]
    assert all(torch.equal(a, b) for a, b in zip(states, backwards))


def test_states_equal_those_of_transformers_with_padding_and_mask(folder, encoder):
    from transformers import UMT5EncoderModel

    model = UMT5EncoderModel.from_pretrained(folder, local_files_only=True).eval()
    texts = ["", CAPTIONS[0], "dog"]
    ids = [encoder.token_ids(text) for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([i + [0] * (longest - len(i)) for i in ids])
    mask = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in ids])
    with torch.no_grad():
        hidden = model(input_ids=padded, attention_mask=mask).last_hidden_state
    for state, row, i in zip(encoder.encode(texts), hidden, ids):
        torch.testing.assert_close(state.float(), row[: len(i)], rtol=1e-2, atol=1e-2)


def test_the_demo_encoder_keeps_different_words_apart(encoder):
    states = torch.stack(encoder.encode(CAPTIONS)).float()
    centres = torch.stack([states[[color in caption.split() for caption in CAPTIONS], 1].mean(0) for color in COLORS])
    nearest = torch.cdist(centres, centres).add(torch.eye(len(COLORS)) * 99).min()
    for color, centre in zip(COLORS, centres):
        own = states[[color in caption.split() for caption in CAPTIONS], 1]
        assert (own - centre).norm(dim=1).max() < nearest


def test_two_builds_are_byte_identical_and_a_used_folder_is_refused(folder, tmp_path):
    again = build_text_encoder(reversed(CAPTIONS), tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    with pytest.raises(UserError, match="not empty"):
        build_text_encoder(CAPTIONS, again)
    with pytest.raises(UserError, match="at least one word"):
        build_text_encoder(["  "], tmp_path / "none")


def test_the_fingerprint_changes_with_weights_pieces_and_length(folder, encoder, tmp_path):
    assert load_text_encoder(folder, 64).fingerprint == encoder.fingerprint
    other_seed = build_text_encoder(CAPTIONS, tmp_path / "seed", seed=1)
    other_words = build_text_encoder([*CAPTIONS, "dog"], tmp_path / "words")
    found = {load_text_encoder(f, n).fingerprint
             for f, n in ((folder, 64), (folder, 63), (other_seed, 64), (other_words, 64))}
    assert len(found) == 4


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "spiece.model").unlink(), "has no spiece.model"),
    (lambda f: (f / "spiece.model").write_bytes(b"no model"), "is no sentencepiece model"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "can run code"),
    (lambda f: (f / "model.safetensors").write_bytes(b"short"), "cannot be loaded as a UMT5 encoder"),
    (lambda f: (f / "config.json").write_text("{"), "cannot be loaded as a UMT5 encoder"),
])
def test_a_folder_that_cannot_be_used_is_named_with_what_it_lacks(folder, tmp_path, damage, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(UserError, match=message):
        load_text_encoder(copy, 64)


def test_a_tokenizer_of_other_weights_is_refused(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    more = build_text_encoder([*CAPTIONS, "dog cat bird"], tmp_path / "more")
    shutil.copy(more / "spiece.model", copy / "spiece.model")
    with pytest.raises(UserError, match="do not belong together"):
        load_text_encoder(copy, 64)


def test_weights_in_several_files_are_read_and_a_missing_one_is_named(folder, tmp_path):
    from transformers import UMT5EncoderModel

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    UMT5EncoderModel.from_pretrained(folder, local_files_only=True).save_pretrained(copy, max_shard_size="100KB")
    names = sorted(set(json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"].values()))
    assert len(names) > 1
    parted, whole = load_text_encoder(copy, 64), load_text_encoder(folder, 64)
    assert all(torch.equal(a, b) for a, b in zip(parted.encode(CAPTIONS[:2]), whole.encode(CAPTIONS[:2])))
    (copy / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        load_text_encoder(copy, 64)


@pytest.mark.parametrize("max_tokens", [0, -1, 513])
def test_texts_longer_than_the_model_has_positions_for_are_refused(folder, max_tokens):
    with pytest.raises(UserError, match="1 to 512"):
        load_text_encoder(folder, max_tokens)
    assert load_text_encoder(folder, 512).max_tokens == MOST_TEXT_TOKENS == LEVEL_TIME


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load_text_encoder(tmp_path / "absent", 64)

"""How large the text shards will be, from a sample of the manifest's captions, and in which form states are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grn_scale.config.data_schema import TextConfig
from grn_scale.data.shard_writer import BLOCK
from grn_scale.data.text_payload import payload_bytes
from grn_scale.tokenizer.text import TextTokenizer, clean_caption, texts_of

VIDEO_LATENTS = 2
"""Clips are counted as videos: how many are images is not known before they are decoded."""


@dataclass(frozen=True)
class TextEstimate:
    """Text entries of a manifest, and the bytes of their shards in each form."""

    entries: int
    tokens: int
    bytes: dict[str, int]
    """none (token ids alone), bf16, int8 -> bytes of all text tars, ids and tar headers included."""

    def chosen(self, text: TextConfig) -> str:
        """The form that text.states names; of `auto` bf16 below the limit, else none."""
        if text.states != "auto":
            return text.states
        return "bf16" if self.bytes["bf16"] < text.states_limit_gigabytes * 1e9 else "none"

    def describe(self, text: TextConfig) -> str:
        """One line for the log."""
        sizes = {form: f"{size / 1e9:,.3g} GB" for form, size in self.bytes.items()}
        return (f"texts: about {self.entries:,} entries with {self.tokens:,} tokens; {sizes['none']} as token ids, "
                f"{sizes['bf16']} with bf16 states, {sizes['int8']} with int8 states; text.states={text.states} keeps "
                f"{self.chosen(text)}")


def estimate_texts(sample: Iterable[Iterable[tuple[str, str]]], lines: int, tokenizer: TextTokenizer,
                   task_tags: bool) -> TextEstimate:
    """The estimate for a manifest of `lines` lines.

    sample: the captions (type, text) of some of its lines, from many places, since clips of one source stand together;
    some thousand are enough. What the different texts of the sample take is scaled to all lines; the empty caption is
    counted once. It is an upper estimate: a caption that returns only outside the sample is counted each time, and a
    clip with task tags counts as a video, whose captions have an entry for T2V and one for I2V. Exact for videos where
    the sample is the whole manifest. A function of its arguments alone.
    """
    sampled, texts = 0, {}
    for captions in sample:
        sampled += 1
        cleaned = (clean_caption(text) for _, text in captions)
        texts.update(dict.fromkeys(texts_of(cleaned, VIDEO_LATENTS, task_tags)))
    texts.pop("", None)
    share = lines / max(1, sampled)
    empty = _Sizes.of([tokenizer.token_ids("")], tokenizer.hidden_size)
    rest = _Sizes.of(map(tokenizer.token_ids, texts), tokenizer.hidden_size)
    return TextEstimate(
        entries=1 + round(share * len(texts)), tokens=empty.tokens + round(share * rest.tokens),
        bytes={form: empty.bytes[form] + round(share * rest.bytes[form]) for form in rest.bytes})


@dataclass(frozen=True)
class _Sizes:
    tokens: int
    bytes: dict[str, int]

    @classmethod
    def of(cls, texts: Iterable[Sequence[int]], hidden: int) -> _Sizes:
        """What these entries (token ids) take in a tar."""
        tokens, sizes = 0, {"none": 0, "bf16": 0, "int8": 0}
        for ids in texts:
            tokens += len(ids)
            written = _member(len(json.dumps({"ids": list(ids)}, separators=(",", ":"))))
            sizes["none"] += written
            for form in ("bf16", "int8"):
                sizes[form] += written + _member(payload_bytes(len(ids), hidden, form))
        return cls(tokens, sizes)


def _member(length: int) -> int:
    """Bytes of a tar member: its header and its payload, filled up to whole blocks."""
    return BLOCK + -(-length // BLOCK) * BLOCK

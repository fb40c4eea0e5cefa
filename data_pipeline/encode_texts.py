"""Captions -> token ids, and where they are cached encoder states -> one text shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from grn_scale.data.schema import Caption, ShardInfo, TextRef, TextRow
from grn_scale.data.shard_writer import write_shard
from grn_scale.data.text_payload import pack_states
from grn_scale.data_pipeline.meter import WorkerMeter
from grn_scale.tokenizer.text import (
    BATCH_TEXTS,
    TextEncoder,
    TextTokenizer,
    tagged_caption,
    tasks_of,
    text_key,
    texts_of,
)

BLOCK_TEXTS = 256
"""Texts whose states are in memory together."""


@dataclass(frozen=True)
class TextSettings:
    """What the text entries of a dataset depend on."""

    fingerprint: str
    """Of the text encoder."""
    hidden_size: int
    max_tokens: int
    task_tags: bool
    states: str
    """How states are stored: bf16, int8, or none."""


class TextShards:
    """Makes text shards with one encoder, or with its tokenizer alone where no states are stored."""

    def __init__(self, settings: TextSettings, encoder: TextEncoder | TextTokenizer, meter: WorkerMeter) -> None:
        self.settings = settings
        self._encoder = encoder
        self._meter = meter

    @property
    def empty_key(self) -> str:
        """Key of the empty caption, which has no tag and stands in the shard of the first chunk."""
        return text_key("", self.settings.fingerprint)

    @property
    def empty_tokens(self) -> int:
        """Tokens of the empty caption."""
        return len(self._encoder.token_ids(""))

    def wanted(self, clips: Iterable[tuple[int, Sequence[str]]], with_empty: bool) -> dict[str, str]:
        """Key -> text of all that clips need, in order; a clip is its latent frames and its cleaned captions."""
        texts = {self.empty_key: ""} if with_empty else {}
        for latent_frames, captions in clips:
            for text in texts_of(captions, latent_frames, self.settings.task_tags):
                texts.setdefault(text_key(text, self.settings.fingerprint), text)
        return texts

    def make(self, path: str, texts: Mapping[str, str],
             confirm: Callable[[], None]) -> tuple[ShardInfo, list[TextRow]]:
        """The shard of the texts (key -> text), and its rows in order.

        confirm: called when all is done and the file is about to appear; if it raises, none does.
        """
        rows = []
        entries = list(texts.items())
        with write_shard(path) as writer:
            for first in range(0, len(entries), BLOCK_TEXTS):
                block = entries[first : first + BLOCK_TEXTS]
                payloads = self._payloads([text for _, text in block])
                with self._meter.timed("text_write"):
                    rows += [writer.add_text(key, self._encoder.token_ids(text), payload)
                             for (key, text), payload in zip(block, payloads)]
            confirm()
        return writer.info, rows

    def caption(self, kind: str, text: str, latent_frames: int, entries: Mapping[str, TextRef]) -> Caption:
        """Index entry of a clip's cleaned caption, given the entries by key."""
        return Caption(kind, {
            task: entries[text_key(tagged_caption(text, task, self.settings.task_tags), self.settings.fingerprint)]
            for task in tasks_of(latent_frames)})

    def _payloads(self, texts: Sequence[str]) -> list[bytes | None]:
        if self.settings.states == "none":
            return [None] * len(texts)
        with self._meter.timed("text_encode"):
            return [pack_states(states, self.settings.states) for states in self._encoder.encode(texts, BATCH_TEXTS)]

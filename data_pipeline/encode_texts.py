"""Second stage of tokenize: captions -> token ids and states -> text shards.

An entry is what the encoder reads: task tag and cleaned caption. It is stored once, in the chunk that uses it
first; the empty caption stands at the head of the first chunk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from grn_scale.data.index_parts import TEXT_SCHEMA, part_path, read_table, write_text_part
from grn_scale.data.schema import Caption, TextRef
from grn_scale.data.shards import write_shard
from grn_scale.data_pipeline.chunks import ChunkRecord, digest, finished, read_record, retire_shard, write_record
from grn_scale.data_pipeline.meter import Meter
from grn_scale.errors import UserError
from grn_scale.tokenizer.text import TextEncoder, tagged_caption, text_key

log = logging.getLogger(__name__)

BLOCK_TEXTS = 256
"""Texts whose states are in memory together."""


def tasks_of(latent_frames: int) -> tuple[str, ...]:
    """Tasks a clip of so many latents can be trained as. Image-to-video needs a frame after the first."""
    return ("T2I",) if latent_frames == 1 else ("T2V", "I2V")


class TextStage:
    """Makes the text shards of a folder that are missing or made from something else."""

    def __init__(self, folder: Path, encoder: TextEncoder, task_tags: bool, batch: int, meter: Meter):
        self.folder = folder
        self.encoder = encoder
        self.task_tags = task_tags
        self.batch = batch
        self.meter = meter
        self.kept = 0
        """Shards that were there already."""
        self._tokens: dict[str, int] = {}

    @property
    def empty_text(self) -> TextRef:
        """Entry of the empty caption, which has no tag."""
        key = text_key("", self.encoder.fingerprint)
        return TextRef(key, self._tokens[key])

    @property
    def texts(self) -> int:
        """Entries in all."""
        return len(self._tokens)

    def run(self, chunks: Sequence[Iterable[tuple[int, str]]]) -> list[ChunkRecord]:
        """The record of every chunk. A chunk is the (latent frames, cleaned caption) pairs its clips need."""
        records = []
        with self.meter.stage("captions", len(chunks)):
            for number, pairs in enumerate(chunks):
                texts = {text_key(text, self.encoder.fingerprint): text for text in self._texts(number, pairs)}
                texts = {key: text for key, text in texts.items() if key not in self._tokens}
                records.append(self._keep_or_make(number, texts))
                self.meter.advance()
        return records

    def caption(self, kind: str, text: str, latent_frames: int) -> Caption:
        """Index entry of a clip's cleaned caption, after `run`."""
        refs = {}
        for task in tasks_of(latent_frames):
            key = text_key(tagged_caption(text, task, self.task_tags), self.encoder.fingerprint)
            refs[task] = TextRef(key, self._tokens[key])
        return Caption(kind, refs)

    def _texts(self, number: int, pairs: Iterable[tuple[int, str]]) -> Iterable[str]:
        if number == 0:
            yield ""
        for latent_frames, text in pairs:
            for task in tasks_of(latent_frames):
                yield tagged_caption(text, task, self.task_tags)

    def _keep_or_make(self, number: int, texts: dict[str, str]) -> ChunkRecord:
        shard = self.folder / f"text-{number:06d}.tar"
        record_path = self.folder / "chunks" / f"text-{number:06d}.json"
        part = part_path(self.folder, shard.name)
        made_from = digest([list(texts)])
        record = read_record(record_path)
        if record is not None and finished(record, made_from, self.folder) and (known := _tokens_of(part)) is not None:
            self.kept += 1
            self._tokens.update(known)
            return record
        retire_shard(shard, record_path)
        rows = []
        with write_shard(shard) as writer:
            entries = list(texts.items())
            for first in range(0, len(entries), BLOCK_TEXTS):
                block = entries[first : first + BLOCK_TEXTS]
                with self.meter.timed("text_encode"):
                    states = self.encoder.encode([text for _, text in block], self.batch)
                with self.meter.timed("text_write"):
                    rows += [writer.add_text(key, self.encoder.token_ids(text), state)
                             for (key, text), state in zip(block, states)]
        write_text_part(part, rows)
        self._tokens.update((row.key, row.tokens) for row in rows)
        record = ChunkRecord(made_from, writer.info)
        write_record(record_path, record)
        return record


def _tokens_of(part: Path) -> dict[str, int] | None:
    """Text key -> tokens of a part; None where it cannot be used, so that shard and part are made again."""
    try:
        table = read_table(part, TEXT_SCHEMA)
    except UserError as error:
        log.warning("%s", error)
        return None
    return dict(zip(table["key"].to_pylist(), table["tokens"].to_pylist()))

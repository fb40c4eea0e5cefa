"""The last step of tokenize: the finished chunks become one dataset.

Only one process needs to do it; where two do, they write the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from grn_scale.data.columns import KEY_DTYPE, key_hashes
from grn_scale.data.dataset_info import write_dataset
from grn_scale.data.index_parts import VIDEO_SCHEMA, read_table, read_video_part, write_video_part
from grn_scale.data.schema import Caption, DatasetInfo, IndexRow, ShardInfo, TextRef
from grn_scale.data_pipeline.job import Job
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.errors import UserError
from grn_scale.tokenizer.text import TextTokenizer, text_key

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"


def write_quarantine(job: Job, records: Records) -> Counter[str]:
    """Write one JSON line for each manifest line that gives no sample; how many there are for each reason."""
    reasons: Counter[str] = Counter()
    with job.storage.write(QUARANTINE_FILE) as stream:
        for line in records.bad_lines(job.digests):
            reasons[line["reason"]] += 1
            shown = {name: line[name] for name in ("line", "id", "path", "reason", "detail")}
            stream.write(f"{json.dumps(shown, ensure_ascii=False)}\n".encode(errors="backslashreplace"))
    return reasons


def finish(job: Job, records: Records, texts: TextTokenizer) -> DatasetInfo:
    """Write the index of all finished chunks and dataset.json. UserError where no line of the manifest gave a sample.

    A clip that stands in several chunks is in the index once, at its first place, with the captions of all.
    """
    finished = [records.get(number, digest) for number, digest in enumerate(job.digests)]
    missing = [number for number, record in enumerate(finished) if record is None]
    if missing:
        raise UserError(f"{len(missing)} of {len(finished)} chunks are not finished, the first is {missing[0]}; run "
                        "the same command again")
    empty_text = TextRef(text_key("", texts.fingerprint), len(texts.token_ids("")), finished[0].text.name)
    videos = _without_repeats(job, finished, empty_text.tokens)
    if not videos:
        raise UserError(f"no line of {job.manifest} gives a sample; see {job.storage / QUARANTINE_FILE}")
    return write_dataset(job.storage, DatasetInfo(
        format_version=0, tokenizer_fingerprint=job.video.tokenizer, latent_channels=job.video.latent_channels,
        rounds=job.video.rounds, text_fingerprint=job.text.fingerprint, text_hidden_size=job.text.hidden_size,
        text_states=job.text.states, task_tags=job.text.task_tags, empty_text=empty_text, fps=job.video.fps,
        video_shards=tuple(videos), text_shards=tuple(record.text for record in finished if record.text)))


def _without_repeats(job: Job, finished: Sequence[ChunkRecord], empty_tokens: int) -> list[ShardInfo]:
    """The video shards in order, those with new index parts where a clip stands in several of them."""
    shards = [record.video for record in finished if record.video]
    places = _repeated(job, shards)
    if not places:
        return shards
    log.info("%d clips stand in more than one chunk of the manifest; each is in the index once", len(places))
    extra: dict[str, list[Caption]] = {key: [] for key in places}
    for number in sorted({number for numbers in places.values() for number in numbers[1:]}):
        for row in read_video_part(job.storage, shards[number], number, 0):
            if number in places.get(row.key, ())[1:]:
                extra[row.key] += row.captions
    touched = {number for numbers in places.values() for number in numbers}
    result = []
    for number, shard in enumerate(shards):
        if number in touched:
            kept = [replace(row, captions=_merged(row, extra.get(row.key, ())))
                    for row in read_video_part(job.storage, shard, number, 0)
                    if number not in places.get(row.key, ())[1:]]
            if not kept:
                continue
            shard = write_video_part(job.storage, replace(shard, samples=len(kept)), kept, empty_tokens)
        result.append(shard)
    return result


def _repeated(job: Job, shards: Sequence[ShardInfo]) -> dict[str, list[int]]:
    """Key -> numbers of the shards it stands in, for the clips that stand in several. Takes 16 bytes a clip."""
    hashes = [key_hashes(_keys(job, shard)) for shard in shards]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True) if hashes else (np.zeros(0), np.zeros(0))
    suspects = values[counts > 1]
    places: dict[str, list[int]] = {}
    for number, shard in enumerate(shards) if len(suspects) else ():
        found = np.isin(hashes[number], suspects)
        if found.any():
            for key in _keys(job, shard)[found]:
                places.setdefault(key.decode(), []).append(number)
    return {key: numbers for key, numbers in places.items() if len(numbers) > 1}


def _keys(job: Job, shard: ShardInfo) -> np.ndarray:
    return np.array(read_table(job.storage, shard, VIDEO_SCHEMA)["key"].to_pylist(), KEY_DTYPE)


def _merged(row: IndexRow, extra: Sequence[Caption]) -> tuple[Caption, ...]:
    """The row's captions, then those of other chunks that it lacks."""
    captions = {(caption.type, _text_keys(caption)): caption for caption in (*extra[::-1], *row.captions[::-1])}
    return tuple(reversed(captions.values()))


def _text_keys(caption: Caption) -> tuple[tuple[str, str], ...]:
    return tuple((task, ref.key) for task, ref in sorted(caption.texts.items()))

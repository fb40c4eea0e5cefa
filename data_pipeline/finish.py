"""The last step of tokenize: the finished chunks become one dataset.

Only one process needs to do it; where two do, they write the same bytes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter

from grn_scale.data.dataset_info import read_dataset_info, write_dataset
from grn_scale.data.schema import DatasetInfo, TextRef
from grn_scale.data_pipeline.job import Job
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.repeats import without_repeats
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


def finished_dataset(job: Job, records: Records) -> DatasetInfo | None:
    """The dataset of the folder where it is that of the finished chunks already; else None."""
    try:
        info = read_dataset_info(job.storage)
    except UserError as error:
        log.debug("%s", error)
        return None
    finished = records.of_job(job.digests)
    made = {(shard.name, shard.sha256) for record in finished for shard in record.shards}
    texts = [record.text.name for record in finished if record.text]
    same = ([shard.name for shard in info.text_shards] == texts and len(finished) == len(job.chunks)
            and {(shard.name, shard.sha256) for shard in (*info.video_shards, *info.text_shards)} <= made)
    return info if same else None


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
    videos, repeated = without_repeats(job.storage, [record.video for record in finished if record.video],
                                       empty_text.tokens)
    if repeated:
        log.info("%d clips stand in more than one chunk of the manifest; each is in the index once", repeated)
    if not videos:
        raise UserError(f"no line of {job.manifest} gives a sample; see {job.storage / QUARANTINE_FILE}")
    return write_dataset(job.storage, DatasetInfo(
        format_version=0, tokenizer_fingerprint=job.video.tokenizer, latent_channels=job.video.latent_channels,
        rounds=job.video.rounds, text_fingerprint=job.text.fingerprint, text_hidden_size=job.text.hidden_size,
        text_states=job.text.states, task_tags=job.text.task_tags, empty_text=empty_text, fps=job.video.fps,
        video_shards=tuple(videos), text_shards=tuple(record.text for record in finished if record.text)))

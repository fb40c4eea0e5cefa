"""The last step of tokenize: the finished chunks become one dataset.

One task of the fleet does it, the others see from a small file that it is done and for which records:

    finished.json     {records: fingerprint, snapshot: of dataset.json, quarantined: {reason: manifest lines}}

It stands only while dataset.json and quarantine.jsonl are what these records give: who rewrites the quarantine, or
finds files of the dataset missing, removes it. Where two processes write them all the same, they write the same bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from grn_scale.data.dataset_info import read_dataset_info, write_dataset
from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data.schema import DatasetInfo, ShardInfo, TextRef
from grn_scale.data_pipeline.job import Job
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.repeats import without_repeats
from grn_scale.errors import UserError
from grn_scale.leases import ClaimLost, Leases
from grn_scale.storage import Storage
from grn_scale.tokenizer.text import TextTokenizer, text_key

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
FINISHED_FILE = "finished.json"
LEASE = "finish"
SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
"""Between two looks whether another task has finished the dataset; the first and the longest."""


@dataclass(frozen=True)
class Finished:
    """A dataset that holds all chunks of a job."""

    info: DatasetInfo
    quarantined: Mapping[str, int]
    """Reason -> manifest lines that gave no sample."""


class UnfinishedChunks(UserError):
    """Chunks have no record that can be used, or files that their records name are not there whole."""


def finished(job: Job, records: Records) -> Finished | None:
    """The dataset of the folder where it is that of the records as they were at their last refresh; else None.

    Reads three files at most, whatever the number of chunks.
    """
    fingerprint = records.fingerprint(job.digests)
    if not fingerprint:
        return None
    try:
        values = json.loads(job.storage.read(FINISHED_FILE))
        if values["records"] != fingerprint:
            return None
        info, quarantined = read_dataset_info(job.storage), dict(values["quarantined"])
        return Finished(info, quarantined) if values["snapshot"] == info.snapshot else None
    except FileNotFoundError:
        return None
    except (UserError, ValueError, KeyError, TypeError) as error:
        log.debug("%s: %s", FINISHED_FILE, error)  # it is made again
        return None


def finished_before(job: Job, records: Records, retry: bool) -> Finished | None:
    """The dataset of a job on which nothing is left to do, its files there whole; else None.

    retry: some of its chunks are to be made again. Where files are missing, no task of the fleet takes the dataset for
    finished until one has looked at all files again.
    """
    found = finished(job, records)
    if found and not _is_whole(job.storage, found.info):
        log.warning("files of the finished dataset in %s are missing or not whole: their chunks are made again",
                    job.storage.location)
        job.storage.delete(FINISHED_FILE)
        return None
    return None if retry else found


def finish_once(job: Job, records: Records, texts: TextTokenizer, leases: Leases) -> Finished | None:
    """The finished dataset, put together by one task of the fleet; the others wait for it.

    None where chunks are to be made again, as files of theirs turned out to be missing: their records are gone then.
    Raises as `finish` does, and UserError where another job has begun in the folder.
    """
    pause = SHORTEST_PAUSE_SECONDS
    while (found := finished(job, records)) is None:
        if leases.claim(LEASE):
            try:
                job.check_generation()
                records.refresh()  # and another may have finished it between the look and the claim
                return finished(job, records) or _finish_all(job, records, texts, leases)
            except UnfinishedChunks as error:
                log.warning("%s", error)
                records.drop_incomplete()
                return None
            except ClaimLost:
                log.warning("another process puts the dataset together by now, as this one was not heard of for too "
                            "long; what was made of it here is dropped")
            finally:
                leases.release(LEASE)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    return found


def _finish_all(job: Job, records: Records, texts: TextTokenizer, leases: Leases) -> Finished:
    def confirm() -> None:
        job.check_generation()
        leases.check(LEASE)

    quarantined = write_quarantine(job, records)
    info = finish(job, records, texts, confirm)
    values = {"records": records.fingerprint(job.digests), "snapshot": info.snapshot,
              "quarantined": dict(sorted(quarantined.items()))}
    confirm()
    job.storage.write_bytes(FINISHED_FILE, f"{json.dumps(values, indent=1)}\n".encode())
    return Finished(info, quarantined)


def write_quarantine(job: Job, records: Records) -> Counter[str]:
    """Write one JSON line for each manifest line that gives no sample; how many there are for each reason."""
    reasons: Counter[str] = Counter()
    job.storage.delete(FINISHED_FILE)
    with job.storage.write(QUARANTINE_FILE) as stream:
        for line in records.bad_lines(job.digests):
            reasons[line["reason"]] += 1
            shown = {name: line[name] for name in ("line", "id", "path", "reason", "detail")}
            stream.write(f"{json.dumps(shown, ensure_ascii=False)}\n".encode(errors="backslashreplace"))
    return reasons


def quarantine_unfinished(job: Job, records: Records, leases: Leases) -> None:
    """Write what is known of bad lines after an error stopped the job; where many tasks stop at once, one does it."""
    try:
        job.check_generation()  # of a job that took over the folder nothing is touched
        if leases.claim(LEASE):
            records.refresh()
            warn_of_quarantined(job, write_quarantine(job, records))
            leases.release(LEASE)
    except (OSError, UserError) as error:  # what stopped the job is what people must see
        log.warning("%s is out of date: %s", QUARANTINE_FILE, error)


def warn_of_quarantined(job: Job, reasons: Mapping[str, int]) -> None:
    """Say how many lines give no sample, and why."""
    if reasons:
        log.warning("%d of the manifest's lines give no sample (%s); see %s. A later run leaves out what failed to "
                    "decode, unless --retry-quarantined is given", sum(reasons.values()),
                    ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
                    job.storage / QUARANTINE_FILE)


def finish(job: Job, records: Records, texts: TextTokenizer, confirm: Callable[[], None] = lambda: None) -> DatasetInfo:
    """Write the index of all finished chunks and dataset.json.

    A clip that stands in several chunks is in the index once, at its first place, with the captions of all. confirm:
    called when dataset.json is about to appear; if it raises, it does not. UserError where no line of the manifest gave
    a sample, UnfinishedChunks where some are not finished or files of theirs are missing.
    """
    names = records.finished(job.digests)
    missing = len(job.chunks) - len(names)
    clips: list[ShardInfo] = []
    captions: list[ShardInfo] = []
    for record in records.read_whole(names):
        if record is None:
            missing += 1
            continue
        clips += [record.video] if record.video else []
        captions += [record.text] if record.text else []
    if missing:
        raise UnfinishedChunks(f"{missing} of {len(job.chunks)} chunks are not finished, or files of theirs are "
                               "missing; run the same command again")
    empty_text = TextRef(text_key("", texts.fingerprint), len(texts.token_ids("")), captions[0].name)
    videos, repeated = without_repeats(job.storage, clips, empty_text.tokens)
    if repeated:
        log.info("%d clips stand in more than one chunk of the manifest; each is in the index once", repeated)
    if not videos:
        raise UserError(f"no line of {job.manifest} gives a sample; see {job.storage / QUARANTINE_FILE}")
    confirm()
    return write_dataset(job.storage, DatasetInfo(
        format_version=0, tokenizer_fingerprint=job.video.tokenizer, latent_channels=job.video.latent_channels,
        rounds=job.video.rounds, text_fingerprint=job.text.fingerprint, text_hidden_size=job.text.hidden_size,
        text_states=job.text.states, task_tags=job.text.task_tags, empty_text=empty_text, fps=job.video.fps,
        video_shards=tuple(videos), text_shards=tuple(captions)))


def _is_whole(storage: Storage, info: DatasetInfo) -> bool:
    """Whether all files of the dataset are there with their sizes, after a look at two folders."""
    sizes, parts = storage.sizes(), set(storage.names(INDEX_FOLDER))
    return all(sizes.get(shard.name) == shard.bytes and INDEX_FOLDER + shard.part in parts
               for shard in (*info.video_shards, *info.text_shards))

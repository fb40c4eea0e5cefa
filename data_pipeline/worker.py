"""One worker of the fleet: claims chunks of the manifest and makes their shards, until none is left.

    python -m grn_scale.data_pipeline.worker --config tokens/config.yaml

`grn-scale tokenize` starts these. A worker talks to no other: what is claimed and what is finished it sees in the
output folder, so workers may come, crash and go on any machine. The next chunk is claimed, and its media files are
hashed, while the present one is encoded, and decoding runs over the border between them.

A worker that slept (a paused machine, a file server that hung) may find that another one has taken its chunk over. It
looks right before a shard and a record appear, and then drops its own. What happens between that look and the renaming
of the file (for an object store: its upload) goes unseen. Then both write the file, with the same bytes, as all workers
of a job have the same environment; only where another one is accepted in that very moment the bytes may be others than
the record says, which `grn-scale verify` shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from grn_scale.command_line import CommandParser, os_error_message, run, start_logging
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.schema import Config
from grn_scale.data.decode import DecodeRequest
from grn_scale.data.decode_pool import DecodePool
from grn_scale.data.index_parts import TEXT_SCHEMA, read_table, read_video_part, write_text_part, write_video_part
from grn_scale.data.manifest_chunks import read_chunk
from grn_scale.data.schema import IndexRow, ShardInfo, TextRef
from grn_scale.data_pipeline.chunks import Contents, Problem, Source, digest, distinct, find_sources, made_from
from grn_scale.data_pipeline.encode_texts import TextShards
from grn_scale.data_pipeline.encode_videos import VideoShards
from grn_scale.data_pipeline.environment import environment
from grn_scale.data_pipeline.job import Job, open_job
from grn_scale.data_pipeline.meter import WorkerMeter
from grn_scale.data_pipeline.published import PublishedTars
from grn_scale.data_pipeline.records import ChunkRecord, RecordName, Records, SourcesRecord
from grn_scale.data_pipeline.retries import asked_for
from grn_scale.data_pipeline.settings import load_text, text_settings, video_settings
from grn_scale.errors import EXIT_FAILED, DoNotRequeue, UserError
from grn_scale.leases import ClaimLost, Leases
from grn_scale.storage import Storage
from grn_scale.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
LONGEST_POLL_SECONDS = 15.0
"""Pause before looking again where all chunks that are left belong to other workers, for long leases."""


@dataclass(frozen=True)
class PlannedChunk:
    """A claimed chunk, and what is to be done about it."""

    number: int
    sources: tuple[Source, ...]
    """All its lines."""
    clips: dict[str, Source]
    """Each clip once, by key."""
    contents: Contents
    """Of its media files."""
    video_from: str
    records: list[ChunkRecord]
    """All of its number, also those made from other lines or settings."""
    kept: ChunkRecord | None
    """An earlier record whose video shard is as good as a new one."""
    kept_rows: list[IndexRow]
    """The clips in that shard."""
    retries: int
    """Times that it was made again for clips that had failed or were missing, this time included."""


class Worker:
    """Makes the shards of the chunks it can claim. `run` does it all."""

    def __init__(self, job: Job, config: Config, records: Records, leases: Leases, videos: VideoShards,
                 texts: TextShards, pool: DecodePool, meter: WorkerMeter) -> None:
        self._job, self._config, self._records, self._leases = job, config, records, leases
        self._videos, self._texts, self._pool, self._meter = videos, texts, pool, meter
        self._asked_for = asked_for(job.storage)
        self._published = PublishedTars(job.storage)
        self._ample = True

    def run(self) -> None:
        """Work until every chunk of the job is finished, by this worker or another.

        Raises DoNotRequeue where more of the manifest is bad than tokenize.max_bad_fraction, UserError, OSError.
        """
        while self._unfinished():
            # The pool draws requests ahead of the results, so the same chunks are walked twice, at two places.
            planned, walked = itertools.tee(self._claimed())
            decoded = self._pool.map(DecodeRequest.of(source.clip, self._config.tokenize) for chunk in planned
                                     if chunk.kept is None for source in chunk.clips.values())
            made = 0
            for chunk in walked:
                try:
                    self._make(chunk, decoded)
                except ClaimLost:
                    log.warning("chunk %d is another worker's by now, as this one was not heard of for too long; what "
                                "was made of it here is dropped", chunk.number)
                self._leases.release(_lease(chunk.number))
                made += 1
            if not made and self._unfinished():
                time.sleep(min(LONGEST_POLL_SECONDS, self._config.tokenize.lease_seconds / 4))
                self._records.refresh()

    def _finished(self) -> list[RecordName]:
        return self._records.finished(self._job.digests)

    def _unfinished(self) -> list[int]:
        return [number for number in range(len(self._job.chunks)) if self._is_unfinished(number)]

    def _is_unfinished(self, number: int) -> bool:
        """Whether a chunk has no record yet, as far as is known, or one that is to give way to a newer one."""
        name = self._records.get(number, self._job.digests[number])
        return name is None or name in self._asked_for

    def _claimed(self) -> Iterator[PlannedChunk]:
        """Claimed chunks, until there is none to be had. The next one is planned while one is worked on."""
        with ThreadPoolExecutor(1, thread_name_prefix="plan-chunk") as planner:
            ahead = planner.submit(self._claim_one)
            while (chunk := ahead.result()) is not None:
                # Near the end a chunk that waits here would be missed by workers that have nothing to do.
                ahead = planner.submit(self._claim_one) if self._ample else None
                yield chunk
                ahead = ahead or planner.submit(self._claim_one)

    def _claim_one(self) -> PlannedChunk | None:
        self._job.check_generation()
        claimed = self._leases.claimed()
        left = self._unfinished()
        free = [number for number in left if _lease(number) not in claimed]
        self._ample = len(free) > len(claimed)
        # Workers that start together begin at different chunks.
        begin = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % max(1, len(free))
        for number in (*free[begin:], *free[:begin], *(number for number in left if _lease(number) in claimed)):
            if not self._is_unfinished(number) or not self._leases.claim(_lease(number)):
                continue
            self._records.refresh()  # another may have finished it since the last look; now none can
            if self._is_unfinished(number):
                with self._meter.timed("hash"):
                    return self._plan(number)
            self._leases.release(_lease(number))
        return None

    def _plan(self, number: int) -> PlannedChunk:
        """What is to be done for a claimed chunk."""
        job = self._job
        lines = read_chunk(job.manifest, job.chunks[number],
                           allow_empty_captions=self._config.tokenize.allow_empty_captions)
        sources, contents = find_sources(lines, job.video, self._records.read_sources(number).contents)
        clips, kept, retries = distinct(sources), None, 0
        video_from, records = made_from(clips), self._records.of_number(number)
        for record in records:
            if record.video_from == video_from:
                kept, retries = record, record.retries
        if asked_again := self._records.get(number, job.digests[number]):
            retries = asked_again.retries + 1
            if kept and kept.failed:
                kept = None
        kept_rows: list[IndexRow] = []
        try:
            if kept and kept.video:
                kept_rows = read_video_part(job.storage, kept.video, 0, 0)
        except UserError as error:
            log.warning("a finished video shard is made anew: %s", error)
            kept = None
        return PlannedChunk(number, tuple(sources), clips, contents, video_from, records, kept, kept_rows, retries)

    def _make(self, chunk: PlannedChunk, decoded: Iterator) -> None:
        job, number = self._job, chunk.number
        self._check_budget(chunk, {})
        if chunk.kept:
            video, failed, rows = chunk.kept.video, self._known_problems(chunk), chunk.kept_rows
        else:
            name = self._shard_name("video", chunk, chunk.video_from)
            video, rows, failed = self._videos.make(job.storage / name, chunk.clips, decoded,
                                                    lambda: self._confirm(number))
            self._check_budget(chunk, failed)
        captions = _captions(chunk.sources)
        text, entries, text_from = self._text(chunk, [(row.thw[0], [text for _, text in captions[row.key]])
                                                      for row in rows])
        if video is not None:
            rows = [dataclasses.replace(row, captions=tuple(
                self._texts.caption(kind, text, row.thw[0], entries) for kind, text in captions[row.key]))
                for row in rows]
            video = write_video_part(job.storage, video, rows, self._texts.empty_tokens)
        bad = _bad_lines(chunk.sources, failed)
        self._confirm(number)
        self._records.write_sources(number, SourcesRecord(chunk.contents))
        self._records.write(ChunkRecord(
            number, job.digests[number], chunk.retries, bad, {key: problem.reason for key, problem in failed.items()},
            chunk.video_from, text_from, video, text))
        self._meter.finished(len(chunk.sources))

    def _confirm(self, number: int) -> None:
        """ClaimLost where the chunk is another worker's by now, UserError where another job has begun."""
        self._job.check_generation()
        self._leases.check(_lease(number))

    def _known_problems(self, chunk: PlannedChunk) -> dict[str, Problem]:
        """Why the clips of a kept shard that are not in it could not be decoded."""
        details = {line["key"]: line["detail"] for line in chunk.kept.bad if line["key"]}
        return {key: Problem(reason, details.get(key, "")) for key, reason in chunk.kept.failed.items()}

    def _shard_name(self, family: str, chunk: PlannedChunk, made_from: str) -> str:
        """Name of a new shard of a claimed chunk: a tar that anybody may read is never written over. As nobody else can
        give the chunk a record meanwhile, no dataset can be published with a tar that is free at this look."""
        in_records = {shard.name for record in chunk.records for shard in record.shards}
        return self._job.shard_name(family, chunk.number, made_from, chunk.retries,
                                    lambda name: name in in_records or self._published.refer_to(name))

    def _text(self, chunk: PlannedChunk, clips: Sequence[tuple[int, Sequence[str]]],
              ) -> tuple[ShardInfo | None, dict[str, TextRef], str]:
        """Text shard of a chunk, its entries by key, and what it was made from."""
        job, number = self._job, chunk.number
        texts = self._texts.wanted(clips, with_empty=number == 0)
        text_from = digest([list(texts), dataclasses.asdict(job.text)])
        if not texts:
            return None, {}, text_from
        for record in chunk.records:
            if record.text_from == text_from and (entries := _stored_texts(job.storage, record.text)):
                return record.text, entries, text_from
        name = self._shard_name("text", chunk, text_from)
        shard, rows = self._texts.make(job.storage / name, texts, lambda: self._confirm(number))
        shard = write_text_part(job.storage, shard, rows)
        return shard, {row.key: TextRef(row.key, row.tokens, shard.name) for row in rows}, text_from

    def _check_budget(self, chunk: PlannedChunk, failed: dict[str, Problem]) -> None:
        """DoNotRequeue where there are now too many bad lines; they are written down for quarantine.jsonl."""
        limit = self._config.tokenize.max_bad_fraction
        # A fraction above 0 allows one line at least: the first try with three clips should go on too.
        allowed = max(1, limit * self._job.lines) if limit > 0 else 0
        bad = _bad_lines(chunk.sources, failed)
        spent = len(bad) + sum(name.bad for name in self._finished() if name.number != chunk.number)
        if spent > allowed:
            self._records.write_sources(chunk.number, SourcesRecord(
                chunk.contents, self._job.digests[chunk.number], bad))
            raise DoNotRequeue(
                f"{spent} of the manifest's {self._job.lines} lines give no sample, more than "
                f"tokenize.max_bad_fraction ({limit:g}) allows; see {self._job.storage / 'quarantine.jsonl'}: mend or "
                "remove those lines, or raise the limit")


def _lease(number: int) -> str:
    return f"{number:06d}"


def _stored_texts(storage: Storage, text: ShardInfo | None) -> dict[str, TextRef]:
    """Entries of a finished text shard by key; none where its index part cannot be read."""
    if text is None:
        return {}
    try:
        table = read_table(storage, text, TEXT_SCHEMA)
    except UserError as error:
        log.warning("a finished text shard is made anew: %s", error)
        return {}
    return {key: TextRef(key, tokens, text.name)
            for key, tokens in zip(table["key"].to_pylist(), table["tokens"].to_pylist())}


def _captions(sources: Sequence[Source]) -> dict[str, dict[tuple[str, str], None]]:
    """Key -> captions of all lines a clip stands in, in order, each once."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for source in sources:
        if source.key:
            found.setdefault(source.key, {}).update(dict.fromkeys(source.captions))
    return found


def _bad_lines(sources: Sequence[Source], failed: dict[str, Problem]) -> tuple[dict[str, object], ...]:
    lines = []
    for source in sources:
        problem = source.problem or failed.get(source.key)
        if problem is not None:
            lines.append({"line": source.line, "id": source.id, "path": source.path,
                          "member": source.clip.member if source.clip else None, "key": source.key,
                          "reason": problem.reason, "detail": problem.detail})
    return tuple(lines)


def work(config: Config, name: str) -> None:
    """Be one worker, called `name`, of the job in config.output, which `grn-scale tokenize` has prepared.

    config: with text.states settled. Raises as `Worker.run` does.
    """
    settings = config.tokenize
    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    storage = Storage.of(config.output)
    with ExitStack() as stack:
        pool = stack.enter_context(DecodePool.of(settings))  # its children start up while the models are loaded
        tokenizer = load_tokenizer(config.tokenizer.path).to(device)
        encoder = load_text(config.text, device)
        text = text_settings(config, encoder)
        leases = stack.enter_context(Leases(storage, settings.lease_seconds))
        job = open_job(storage, Path(config.data.manifest).absolute(), settings, video_settings(config, tokenizer),
                       text, leases)
        job.check_environment(environment(settings, device))
        meter = stack.enter_context(WorkerMeter(storage, name, settings.decode_processes, lambda: pool.busy_seconds,
                                                len(job.chunks)))
        records = Records(storage)
        records.refresh()
        videos = stack.enter_context(VideoShards(job.video, settings, tokenizer, meter))
        Worker(job, config, records, leases, videos, TextShards(text, encoder, meter), pool, meter).run()


def main(argv: list[str]) -> int:
    """Exit code of one worker; it ends when the process that started it does."""
    parser = CommandParser("tokenize worker", "Be one worker of a job that `grn-scale tokenize` has prepared.",
                           "python -m grn_scale.data_pipeline.worker --config tokens/config.yaml --name w0",
                           schema=SCHEMAS)
    parser.add_argument("--name", required=True, help="name of its status file in workers/")
    config, options = parser.parse_command(argv)
    start_logging(logging.WARNING)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="watch-parent", daemon=True).start()
    try:
        work(config, options.name)
    except OSError as error:
        message = os_error_message(error)
        if message is None:
            raise
        # Not as an error that ends the whole job: the fleet starts a worker again that died of a hiccup of its storage.
        log.error("%s", message)
        return EXIT_FAILED
    return 0


def _end_with(parent: int) -> None:
    """End this process at once when its parent is gone; what is unfinished is made again by the next run."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(run(main))

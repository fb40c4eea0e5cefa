"""grn-scale index repair: make what is damaged in a dataset ready to be made again, and nothing else.

    grn-scale index repair tokens/ --dry-run

A tar is judged by its sha256 and never touched. Where it is whole and its index part is not, the part is made from it:
fully for texts, without the captions for clips. Where a tar is damaged or missing, the record of its chunk forgets
it. The next run of `grn-scale tokenize` then makes just those shards and captions, and the index with them. Until it
has, dataset.json names what it named before.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.data.dataset_info import read_dataset_info, snapshots, write_dataset
from grn_scale.data.schema import DatasetInfo, ShardInfo
from grn_scale.data_pipeline.chunk_files import read_records
from grn_scale.data_pipeline.damage import THREADS
from grn_scale.data_pipeline.job import JOB_FILE
from grn_scale.data_pipeline.records import ChunkRecord, Records
from grn_scale.data_pipeline.tar_check import TarCheck, check_tar
from grn_scale.errors import EXIT_FAILED, UserError
from grn_scale.storage import Storage

UNFINISHED = "0" * 64
"""Digest of the record of a chunk that has something left to be made."""


@dataclass
class Repair:
    """What came of it, as sentences."""

    done: list[str] = field(default_factory=list)
    to_make: list[str] = field(default_factory=list)
    """What `grn-scale tokenize` makes again."""
    beyond: list[str] = field(default_factory=list)
    """What takes another copy of the files."""


def repair(storage: Storage, dry_run: bool = False) -> Repair:
    """Repair a dataset; see above. Not to be run while workers make shards in the folder.

    dry_run: only say what would be done. Raises UserError where the folder holds no dataset, OSError where it cannot
    be read or written.
    """
    report = Repair()
    info = _newest(storage, report)
    records, unreadable = read_records(storage)
    for name in unreadable:
        report.done.append(f"{name} cannot be read: removed")
        report.to_make.append(f"the chunk of {name}")
        if not dry_run:
            storage.delete(name)
    owned = [shard for group in records.values() for record in group for shard in record.shards]
    listed = [*info.video_shards, *info.text_shards] if info else []
    checks = _check_all(storage, owned, listed, info, dry_run)
    lost = report.to_make if storage.exists(JOB_FILE) else report.beyond
    for check in checks.values():
        report.done += check.done
        if check.lost:
            lost.append(f"{check.shard.name}: {check.lost}")
    for record in (record for group in records.values() for record in group):
        _mend_record(storage, record, checks, report, dry_run)
    if info is not None:
        _mend_summary(storage, info, checks, report, dry_run)
    # A tar that the record and the summary describe differently is named once.
    return Repair(*(list(dict.fromkeys(sentences)) for sentences in (report.done, report.to_make, report.beyond)))


def _newest(storage: Storage, report: Repair) -> DatasetInfo | None:
    try:
        info = read_dataset_info(storage)
    except UserError as error:
        if not storage.exists(JOB_FILE):
            raise
        report.to_make.append(f"the index: {error}")
        return None
    for snapshot in snapshots(storage):
        try:
            read_dataset_info(storage, snapshot)
        except UserError as error:
            report.beyond.append(f"an older snapshot: {error}; or remove it with `grn-scale index gc`")
    return info


def _check_all(storage: Storage, owned: list[ShardInfo], listed: list[ShardInfo], info: DatasetInfo | None,
               dry_run: bool) -> dict[ShardInfo, TarCheck]:
    """What is right of each shard, as records and the summary describe it; missing index parts are made."""
    by_tar: dict[str, list[ShardInfo]] = defaultdict(list)
    for shard in dict.fromkeys((*owned, *listed)):
        by_tar[shard.name].append(shard)
    empty_tokens = info.empty_text.tokens if info else None
    in_records = set(owned)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="repair") as pool:
        try:
            found = pool.map(lambda name: check_tar(storage, by_tar[name], in_records, empty_tokens, dry_run),
                             sorted(by_tar))
            return {check.shard: check for checks in found for check in checks}
        finally:
            pool.shutdown(cancel_futures=True)


def _mend_record(storage: Storage, record: ChunkRecord, checks: dict[ShardInfo, TarCheck], report: Repair,
                 dry_run: bool) -> None:
    """Write the record anew without what is lost, so that its chunk is made again as far as that is needed."""
    new = record
    for family in ("video", "text"):
        shard = getattr(record, family)
        check = checks[shard] if shard else None
        if check is None:
            continue
        if check.new is None:
            new = replace(new, digest=UNFINISHED, **{family: None, f"{family}_from": ""})
        elif check.lost:
            new = replace(new, digest=UNFINISHED, **{family: check.new})
        else:
            new = replace(new, **{family: check.new})
    if new == record:
        return
    unfinished = new.digest == UNFINISHED
    report.done.append(f"{record.name}: {'its chunk counts as unfinished now' if unfinished else 'is corrected'}")
    if dry_run:
        return
    if new.shards:
        Records(storage).write(new)
    if new.name != record.name or not new.shards:
        storage.delete(record.name)


def _mend_summary(storage: Storage, info: DatasetInfo, checks: dict[ShardInfo, TarCheck], report: Repair,
                  dry_run: bool) -> None:
    """Write the summary anew where parts were made for it or its sums are wrong; lost shards stay in it."""
    def kept(shards: tuple[ShardInfo, ...]) -> tuple[ShardInfo, ...]:
        return tuple(shard if checks[shard].lost else checks[shard].new or shard for shard in shards)

    new = replace(info, video_shards=kept(info.video_shards), text_shards=kept(info.text_shards))
    sums = [sum(getattr(shard, name) for shard in new.video_shards) for name in ("samples", "tokens")]
    if new == info and sums == [info.samples, info.tokens]:
        return
    report.done.append("the summary and dataset.json: written anew")
    if not dry_run:
        write_dataset(storage, new)


def run_repair(argv: list[str]) -> int:
    """Exit code of `grn-scale index repair argv...`: 1 where something takes another copy of the files."""
    parser = CommandParser(
        "index repair", "Find what is damaged in the dataset DIR, make its index parts anew where the tars are whole, "
        "and have the next `grn-scale tokenize` make what is lost. No tar is changed or removed. Not to be run while "
        "workers make shards there.", "grn-scale index repair tokens/ --dry-run", configured=False, json=True)
    parser.add_argument("folder", metavar="DIR", help="folder or URL of token shards")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    options = parser.parse_options(argv)
    start_logging()
    report = repair(Storage.of(options.folder), options.dry_run)
    print(json.dumps({"dataset": options.folder, "dry_run": options.dry_run, **asdict(report)}, indent=1)
          if options.json else "\n".join(_lines(options.folder, report, options.dry_run)))
    return EXIT_FAILED if report.beyond else 0


def _lines(folder: str, report: Repair, dry_run: bool) -> Iterator[str]:
    for what in report.done:
        yield f"{'would be done' if dry_run else 'done'}: {what}"
    for what in report.to_make:
        yield f"to be made again: {what}"
    for what in report.beyond:
        yield f"cannot be mended: {what}"
    if report.to_make:
        yield f"{folder}: run the `grn-scale tokenize` command that made it again; it makes these and keeps the rest"
    if report.beyond:
        yield f"{folder}: copy again from where it came what cannot be mended here"
    if not (report.done or report.to_make or report.beyond):
        yield f"{folder}: nothing to repair"

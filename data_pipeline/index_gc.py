"""grn-scale index gc: remove what no kept state of a dataset needs.

    grn-scale index gc tokens/ --keep 2 --dry-run

Snapshots go first, the oldest before the others, and what they referred to after them: a kill in between leaves
files that nothing needs, and the next run removes those. Only files with names that grn_scale gives are looked at.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import asdict, dataclass

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.data.dataset_info import DATASET_FILE, read_dataset_info, snapshot_name, snapshots
from grn_scale.data.index_parts import INDEX_FOLDER
from grn_scale.data_pipeline.chunk_files import PART, SOURCES, TAR, chunk_files, chunk_of_file, read_records
from grn_scale.data_pipeline.index_merge import MERGE_FILE
from grn_scale.data_pipeline.job import JOB_FILE, MANIFEST_FILE
from grn_scale.data_pipeline.records import FOLDER as RECORDS
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import LocalStorage, Storage

_SNAPSHOT = re.compile(r"index/snapshot-[0-9a-f]{16}\.parquet")
_OTHER = re.compile(r"(dataset|tokenize|manifest|merge|status|finished)\.json|quarantine\.jsonl|config\.yaml")
_PARTIAL = re.compile(r"(.+?)\.[A-Za-z0-9_-]+\.partial")
"""What a killed writer leaves, after the name that the file was to get."""


@dataclass(frozen=True)
class Removal:
    """A file that goes, and why."""

    name: str
    why: str
    bytes: int
    """Space that this frees: none where another name of the same file stays."""


def find_garbage(storage: LocalStorage, keep: int = 1, older_than: float = 24.0) -> list[Removal]:
    """What can go, in the order in which it has to.

    keep: newest snapshots that stay, that of dataset.json among them. older_than: hours for which a file has not been
    written to; younger ones may be a running job's. Raises UserError for a folder that grn_scale did not make, and
    where a snapshot that stays cannot be read.
    """
    oldest = time.time() - older_than * 3600
    kept, dropped = _divided(storage, keep, oldest)
    chunks = _chunks(storage)
    gone = {name for name in chunk_files(storage) if chunk_of_file(name) >= chunks and
            _modified(storage, name) < oldest}
    needed = _of_records(storage, gone)
    for snapshot in kept:
        info = read_dataset_info(storage, snapshot)
        for shard in (*info.video_shards, *info.text_shards):
            needed |= {shard.name, INDEX_FOLDER + shard.part}
    found = [_removal(storage, snapshot_name(snapshot), "an older snapshot") for snapshot in dropped]
    found += [_removal(storage, name, "of a chunk that the manifest no longer has") for name in sorted(gone)]
    for name in (*storage.names(INDEX_FOLDER), *storage.names(), *storage.names(RECORDS), *storage.names(SOURCES)):
        unneeded = _is_shard(name) and name not in needed
        if (unneeded or _is_leftover(name)) and _modified(storage, name) < oldest:
            found.append(_removal(storage, name, "nothing refers to it" if unneeded else "left by a killed writer"))
    return found


def collect(storage: LocalStorage, keep: int = 1, older_than: float = 24.0) -> list[Removal]:
    """Remove what `find_garbage` finds, with the same arguments; what is gone."""
    found = find_garbage(storage, keep, older_than)
    for removal in found:
        storage.delete(removal.name)
    return found


def _divided(storage: LocalStorage, keep: int, oldest: float) -> tuple[list[str], list[str]]:
    """Snapshots that stay, and those that go, the oldest first; none of them written to since `oldest`."""
    found = snapshots(storage)
    if not storage.exists(DATASET_FILE):
        if not any(storage.exists(name) for name in (JOB_FILE, MERGE_FILE)):
            raise UserError(f"{storage.location} was not made by grn-scale; correct the path")
        if not found:
            return [], []
    newest = next(name for name in found if read_dataset_info(storage).snapshot.startswith(name))
    ages = {name: _modified(storage, snapshot_name(name)) for name in found}
    by_age = sorted(found, key=lambda name: (name == newest, ages[name], name))
    # A young one may be about to become that of dataset.json.
    dropped = [name for name in by_age[:-keep] if ages[name] < oldest]
    return [name for name in found if name not in dropped], dropped


def _chunks(storage: Storage) -> float:
    """Chunks that the manifest was cut into when it was tokenized last; infinite where that is not known."""
    try:
        return len(json.loads(storage.read(MANIFEST_FILE))["chunks"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf  # the records of all chunks stay


def _of_records(storage: Storage, gone: set[str]) -> set[str]:
    """Tars and parts of finished chunks, which a later run of tokenize takes up."""
    records, _ = read_records(storage)
    return {needed for group in records.values() for record in group if record.name not in gone
            for shard in record.shards for needed in (shard.name, INDEX_FOLDER + shard.part)}


def _is_shard(name: str) -> bool:
    return bool(TAR.fullmatch(name) or PART.fullmatch(name))


def _is_leftover(name: str) -> bool:
    match = _PARTIAL.fullmatch(name)
    return match is not None and (chunk_of_file(match[1]) is not None or
                                  any(kind.fullmatch(match[1]) for kind in (TAR, PART, _SNAPSHOT, _OTHER)))


def _modified(storage: LocalStorage, name: str) -> float:
    """Unix time; now for a file that has just gone."""
    try:
        return storage.path(name).stat().st_mtime
    except FileNotFoundError:
        return time.time()


def _removal(storage: LocalStorage, name: str, why: str) -> Removal:
    try:
        status = storage.path(name).stat()
    except FileNotFoundError:
        return Removal(name, why, 0)
    return Removal(name, why, status.st_size if status.st_nlink == 1 else 0)


def run_gc(argv: list[str]) -> int:
    """Exit code of `grn-scale index gc argv...`."""
    parser = CommandParser(
        "index gc", "Remove the older snapshots of the dataset DIR, and the tars, index parts and records that nothing "
        "needs any more. A run that still trains on an older snapshot needs it: keep as many as runs go back.",
        "grn-scale index gc tokens/ --keep 2 --dry-run", configured=False, json=True)
    parser.add_argument("folder", metavar="DIR", help="local folder of token shards")
    parser.add_argument("--keep", type=int, default=1, metavar="N", help="newest snapshots that stay (default: 1)")
    parser.add_argument("--older-than", type=float, default=24.0, metavar="HOURS",
                        help="spare what was written within the last HOURS, which a job may be making (default: 24)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    options = parser.parse_options(argv)
    if options.keep < 1 or not options.older_than >= 0:
        raise ConfigError(f"--keep ({options.keep}) must be at least 1 and --older-than ({options.older_than}) at "
                          "least 0")
    storage = Storage.of(options.folder)
    if not isinstance(storage, LocalStorage):
        raise ConfigError(f"index gc goes by the age of files and works on local folders, not on {options.folder}")
    start_logging()
    found = (find_garbage if options.dry_run else collect)(storage, options.keep, options.older_than)
    freed = sum(removal.bytes for removal in found)
    if options.json:
        print(json.dumps({"dataset": options.folder, "dry_run": options.dry_run, "bytes": freed,
                          "removed": [asdict(removal) for removal in found]}, indent=1))
        return 0
    for removal in found:
        print(f"{removal.name}  {removal.bytes} bytes  {removal.why}")
    print(f"{options.folder}: {len(found)} files, {freed} bytes {'would be freed' if options.dry_run else 'freed'}")
    return 0

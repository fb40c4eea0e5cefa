"""grn-scale index merge: several datasets of one tokenizer and one text encoder become one.

    grn-scale index merge tokens-a/ tokens-b/ --output tokens/

The tars are linked where the file system can, and copied elsewhere; the index is written anew, because its rows name
text shards. dataset.json comes last: a merge that was ended before goes on when the same command is run again.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.data.caption_columns import CaptionColumns
from grn_scale.data.dataset_info import DATASET_FILE, read_dataset_info, write_dataset
from grn_scale.data.index_parts import TEXT_SCHEMA, VIDEO_SCHEMA, read_table, write_table, write_video_table
from grn_scale.data.schema import DatasetInfo, ShardInfo
from grn_scale.data_pipeline.repeats import without_repeats
from grn_scale.data_pipeline.shard_members import PIECE, ShardStream
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import LocalStorage, Storage

log = logging.getLogger(__name__)

MERGE_FILE = "merge.json"
"""Marks a folder as the output of a merge, and says of what."""
THREADS = 8
"""Parts that are written at a time: each waits for the disk longer than for the processor."""
SAME = ("tokenizer_fingerprint", "latent_channels", "rounds", "fps", "text_fingerprint", "text_hidden_size",
        "text_states", "task_tags")
"""What datasets must have in common to be one."""


@dataclass(frozen=True)
class _Part:
    """A shard of the result, and where it is now."""

    storage: Storage
    source: ShardInfo
    name: str
    text_shards: dict[str, str]
    """Names that the text shards of its dataset get."""
    empty_tokens: int
    """Of its dataset's empty caption."""


def merge(folders: Sequence[str], output: str, copy: bool = False) -> dict[str, Any]:
    """Write the dataset that holds the newest states of those in `folders`, in this order; a summary as plain values.

    copy: do not link. A clip that stands in several of them is in the index once, with the captions of all. Raises
    UserError where they differ in what `SAME` lists, where one cannot be read, and where `output` holds other things.
    """
    sources = [(Storage.of(folder), read_dataset_info(folder)) for folder in folders]
    _check_same(sources)
    target = Storage.of(output)
    _claim(target, sources)
    text_jobs: list[_Part] = []
    video_jobs: list[_Part] = []
    for number, (storage, info) in enumerate(sources):
        names = {shard.name: f"text-{len(text_jobs) + i:06d}.tar" for i, shard in enumerate(info.text_shards)}
        text_jobs += [_Part(storage, shard, names[shard.name], names, 0) for shard in info.text_shards]
        video_jobs += [_Part(storage, shard, f"video-{len(video_jobs) + i:06d}.tar", names, info.empty_text.tokens)
                       for i, shard in enumerate(info.video_shards)]
        if number == 0:
            empty = replace(info.empty_text, shard=names[info.empty_text.shard])
    tars = {job.name: job for job in (*text_jobs, *video_jobs)}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="merge") as pool:
        texts = list(pool.map(functools.partial(_write_text, target), text_jobs))
        videos = list(pool.map(functools.partial(_write_video, target), video_jobs))
    videos, repeated = without_repeats(target, videos, empty.tokens)
    linked = sum(_bring(tars[shard.name], target, copy) for shard in (*texts, *videos))
    info = write_dataset(target, replace(sources[0][1], empty_text=empty, video_shards=tuple(videos),
                                         text_shards=tuple(texts)))
    shards = (*info.video_shards, *info.text_shards)
    return {"output": target.location, "snapshot": info.snapshot, "samples": info.samples,
            "visual_tokens": info.tokens, "video_shards": len(info.video_shards), "text_shards": len(info.text_shards),
            "bytes": sum(shard.bytes for shard in shards), "linked_shards": linked,
            "copied_shards": len(shards) - linked, "clips_that_stood_twice": repeated,
            "from": [{"dataset": storage.location, "snapshot": source.snapshot, "samples": source.samples}
                     for storage, source in sources]}


def _check_same(sources: Sequence[tuple[Storage, DatasetInfo]]) -> None:
    first_storage, first = sources[0]
    for storage, info in sources[1:]:
        different = [f"{name} {getattr(first, name)} and {getattr(info, name)}" for name in SAME
                     if getattr(first, name) != getattr(info, name)]
        if different:
            raise UserError(f"{first_storage.location} and {storage.location} cannot be one dataset, they differ in "
                            f"{'; '.join(different)}. Tokenize one of them again with the other's settings, or train "
                            "on both as a mixture (data.mixture)")


def _claim(target: Storage, sources: Sequence[tuple[Storage, DatasetInfo]]) -> None:
    """Make the output folder this merge's. UserError where it holds anything else."""
    plan = json.dumps({"about": "output of grn-scale index merge",
                       "from": [[storage.location, info.snapshot] for storage, info in sources]}, indent=1).encode()
    local = isinstance(target, LocalStorage) and target.folder.exists()
    if local and not target.folder.is_dir():
        raise UserError(f"--output {target.location} is a file; give a new folder")
    found = os.listdir(target.folder) if local else target.names()
    if not target.exists(MERGE_FILE):
        if any(MERGE_FILE not in name for name in found):
            raise UserError(f"--output {target.location} is not empty; give a new folder")
        target.create(MERGE_FILE, plan)
    if target.read(MERGE_FILE) != plan:
        raise UserError(f"--output {target.location} is of another merge, or its datasets have changed since; give a "
                        "new folder")
    if target.exists(DATASET_FILE):
        raise UserError(f"--output {target.location} is finished already")


def _write_text(target: Storage, job: _Part) -> ShardInfo:
    return write_table(target, replace(job.source, name=job.name), read_table(job.storage, job.source, TEXT_SCHEMA))


def _write_video(target: Storage, job: _Part) -> ShardInfo:
    table = _renamed(read_table(job.storage, job.source, VIDEO_SCHEMA), job.text_shards, job.storage)
    return write_video_table(target, replace(job.source, name=job.name), table, job.empty_tokens)


def _renamed(table: pa.Table, names: dict[str, str], storage: Storage) -> pa.Table:
    """The rows of a video part with the names that the text shards have in the result."""
    captions = CaptionColumns.of(table)
    shards = captions.texts.field("shard")
    numbers = pc.index_in(shards, pa.array(names, pa.string()))
    if numbers.null_count:
        text = int(np.flatnonzero(numbers.is_null())[0])
        sample = int(captions.owners[captions.text_owners[text]])
        raise UserError(f"{storage.location}: sample {table['key'][sample].as_py()} needs the text shard "
                        f"{shards[text].as_py()!r}, which is no shard of the dataset; see `grn-scale verify`")
    return captions.with_shards(pa.array(names.values(), pa.string()).take(numbers)).put_into(table)


def _bring(tar: _Part, target: Storage, copy: bool) -> bool:
    """Put a tar into the result, unless it is there whole; whether it shares its bytes with the source."""
    shard = tar.source
    if target.exists(tar.name) and target.size(tar.name) == shard.bytes:
        return _shared(tar, target)
    if not copy and isinstance(tar.storage, LocalStorage) and isinstance(target, LocalStorage):
        try:
            if tar.storage.size(shard.name) != shard.bytes:
                raise UserError(f"{tar.storage / shard.name} is not whole; see `grn-scale verify`")
            target.delete(tar.name)
            os.link(tar.storage.path(shard.name), target.path(tar.name))
            return True
        except FileNotFoundError as error:
            raise UserError(f"{tar.storage / shard.name} is missing; see `grn-scale verify`") from error
        except OSError as error:  # another file system, or one without links
            log.info("%s is copied: it cannot be linked (%s)", tar.name, error.strerror or error)
    try:
        stream = ShardStream(tar.storage, shard.name)
        with target.write(tar.name) as written:
            while piece := stream.read(PIECE):
                written.write(piece)
            if stream.finish() != (shard.bytes, shard.sha256):
                raise UserError(f"{tar.storage / shard.name} is damaged: its size or sha256 is not the one in the "
                                "summary; see `grn-scale verify`")
    except FileNotFoundError as error:
        raise UserError(f"{tar.storage / shard.name} is missing; see `grn-scale verify`") from error
    return False


def _shared(tar: _Part, target: Storage) -> bool:
    return isinstance(tar.storage, LocalStorage) and isinstance(target, LocalStorage) and os.path.samefile(
        tar.storage.path(tar.source.name), target.path(tar.name))


def run_merge(argv: list[str]) -> int:
    """Exit code of `grn-scale index merge argv...`."""
    parser = CommandParser(
        "index merge", "Make one dataset of several. The given ones stay as they are; their tars are linked, which "
        "takes no space, or copied where that is impossible.",
        "grn-scale index merge tokens-a/ tokens-b/ --output tokens/", configured=False, json=True)
    parser.add_argument("datasets", nargs="+", metavar="DIR", help="folders or URLs of token shards, two or more")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder or URL")
    parser.add_argument("--copy", action="store_true", help="copy the tars, checking their sha256, instead of linking")
    options = parser.parse_options(argv)
    if len(options.datasets) < 2:
        raise ConfigError("index merge makes one dataset of several; give two or more")
    start_logging()
    summary = merge(options.datasets, options.output, options.copy)
    print(json.dumps(summary, indent=1) if options.json else "\n".join(_lines(summary)))
    return 0


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    for source in summary["from"]:
        yield f"{source['dataset']}: {source['samples']} samples"
    if summary["clips_that_stood_twice"]:
        yield f"{summary['clips_that_stood_twice']} clips stood in several; each is there once, with all its captions"
    yield (f"{summary['output']}: {summary['samples']} samples in {summary['video_shards']} video and "
           f"{summary['text_shards']} text shards, {summary['bytes'] / 1e6:.1f} MB "
           f"({summary['linked_shards']} shards linked, {summary['copied_shards']} copied); snapshot "
           f"{summary['snapshot'][:16]}")

"""grn-scale index merge: several datasets of one tokenizer and one text encoder become one.

    grn-scale index merge tokens-a/ tokens-b/ --output tokens/

The tars are linked where the file system can, and copied elsewhere; the index is written anew, because its rows name
text shards. dataset.json comes last: a merge that was ended before goes on when the same command is run again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.data.dataset_info import DATASET_FILE, read_dataset_info, write_dataset
from grn_scale.data.index_parts import TEXT_SCHEMA, read_table, read_video_part, write_text_part, write_video_part
from grn_scale.data.schema import Caption, DatasetInfo, IndexRow, ShardInfo, TextRef, TextRow
from grn_scale.data_pipeline.repeats import without_repeats
from grn_scale.data_pipeline.shard_members import PIECE, ShardStream
from grn_scale.errors import ConfigError, UserError
from grn_scale.storage import LocalStorage, Storage

log = logging.getLogger(__name__)

MERGE_FILE = "merge.json"
"""Marks a folder as the output of a merge, and says of what."""
SAME = ("tokenizer_fingerprint", "latent_channels", "rounds", "fps", "text_fingerprint", "text_hidden_size",
        "text_states", "task_tags")
"""What datasets must have in common to be one."""


@dataclass(frozen=True)
class _Tar:
    """A shard of the result, and where its bytes are now."""

    storage: Storage
    source: ShardInfo
    name: str


def merge(folders: Sequence[str], output: str, copy: bool = False) -> dict[str, Any]:
    """Write the dataset that holds the newest states of those in `folders`, in this order; a summary as plain values.

    copy: do not link. A clip that stands in several of them is in the index once, with the captions of all. Raises
    UserError where they differ in what `SAME` lists, where one cannot be read, and where `output` holds other things.
    """
    sources = [(Storage.of(folder), read_dataset_info(folder)) for folder in folders]
    _check_same(sources)
    target = Storage.of(output)
    _claim(target, sources)
    texts, videos, tars = [], [], {}
    for number, (storage, info) in enumerate(sources):
        names = {shard.name: f"text-{len(texts) + i:06d}.tar" for i, shard in enumerate(info.text_shards)}
        for shard in info.text_shards:
            rows = [TextRow(**row) for row in read_table(storage, shard, TEXT_SCHEMA).to_pylist()]
            tars[names[shard.name]] = _Tar(storage, shard, names[shard.name])
            texts.append(write_text_part(target, replace(shard, name=names[shard.name]), rows))
        for shard in info.video_shards:
            rows = [_renamed(row, names, storage) for row in read_video_part(storage, shard, 0, 0)]
            name = f"video-{len(videos):06d}.tar"
            tars[name] = _Tar(storage, shard, name)
            videos.append(write_video_part(target, replace(shard, name=name), rows, info.empty_text.tokens))
        if number == 0:
            empty = replace(info.empty_text, shard=names[info.empty_text.shard])
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


def _renamed(row: IndexRow, names: dict[str, str], storage: Storage) -> IndexRow:
    """The row with the names that the text shards have in the result."""
    try:
        return replace(row, captions=tuple(
            Caption(caption.type, {task: TextRef(ref.key, ref.tokens, names[ref.shard])
                                   for task, ref in caption.texts.items()}) for caption in row.captions))
    except KeyError as error:
        raise UserError(f"{storage.location}: sample {row.key} needs the text shard {error}, which is no shard of the "
                        "dataset; see `grn-scale verify`") from error


def _bring(tar: _Tar, target: Storage, copy: bool) -> bool:
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


def _shared(tar: _Tar, target: Storage) -> bool:
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

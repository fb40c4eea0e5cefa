"""grn-scale index build: write the summary and dataset.json of a folder anew from what tokenize has finished there.

    grn-scale index build tokens/

It is the last step of `grn-scale tokenize` by itself: no clip is decoded, and no shard or chunk is made. Captions stand
in no video tar, so a chunk without its record and index part is not enough: tokenize makes those again.
"""

from __future__ import annotations

import json
from pathlib import Path

from grn_scale.command_line import CommandParser, start_logging
from grn_scale.config.check import check_set
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.load import load_config
from grn_scale.config.schema import Config
from grn_scale.data.schema import DatasetInfo
from grn_scale.data_pipeline.chunks import VideoSettings
from grn_scale.data_pipeline.finish import finish
from grn_scale.data_pipeline.job import JOB_FILE, open_job
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.settings import text_settings
from grn_scale.errors import ConfigError, UserError
from grn_scale.leases import Leases
from grn_scale.storage import LocalStorage, Storage
from grn_scale.tokenizer.text import load_text_tokenizer


def build(storage: Storage, config: Config) -> DatasetInfo:
    """Write the index of the finished chunks and dataset.json, as tokenize with `config` does at its end.

    config: with text.states settled, as in the config.yaml that tokenize saves. Raises UserError where chunks are not
    finished, or a shard of theirs is not there whole.
    """
    check_set(config, "data.manifest", "text.encoder")
    texts = load_text_tokenizer(config.text.encoder, config.text.max_tokens)
    video = _video_settings(storage)
    with Leases(storage, config.tokenize.lease_seconds) as leases:
        job = open_job(storage, Path(config.data.manifest).absolute(), config.tokenize, video,
                       text_settings(config, texts), leases)
    records = Records(storage)
    records.refresh()
    sizes = storage.sizes()
    for record in records.of_job(job.digests):
        for shard in record.shards:
            if sizes.get(shard.name) != shard.bytes:
                raise UserError(f"{storage / shard.name} is missing or of another size than its record says; run "
                                f"`grn-scale index repair {storage.location}`, then tokenize again")
    return finish(job, records, texts)


def _video_settings(storage: Storage) -> VideoSettings:
    try:
        return VideoSettings(**json.loads(storage.read(JOB_FILE))["video"])
    except FileNotFoundError as error:
        raise UserError(f"{storage.location} is no output of `grn-scale tokenize`: it has no {JOB_FILE}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{storage / JOB_FILE} cannot be read ({error!r}); copy it again") from error


def run_build(argv: list[str]) -> int:
    """Exit code of `grn-scale index build argv...`."""
    parser = CommandParser(
        "index build", "Write the index of the folder DIR (the first argument) and its dataset.json anew from what "
        "tokenize has finished there, without decoding or encoding anything. The configuration is the config.yaml that "
        "tokenize left in DIR, unless --config gives another.",
        "grn-scale index build tokens/", json=True, schema=SCHEMAS)
    named = bool(argv) and not argv[0].startswith("-")
    options = parser.parse_unresolved(argv[1:] if named else argv)
    if not named:
        raise ConfigError(f"no folder: {parser.prog} DIR")
    storage = Storage.of(argv[0])
    file = options.config or _saved_config(storage)
    start_logging()
    info = build(storage, load_config(file, options.overrides, SCHEMAS))
    if options.json:
        print(json.dumps({"dataset": argv[0], "snapshot": info.snapshot, "samples": info.samples,
                          "visual_tokens": info.tokens, "video_shards": len(info.video_shards),
                          "text_shards": len(info.text_shards)}, indent=1))
    else:
        print(f"{argv[0]}: {info.samples} samples in {len(info.video_shards)} video and {len(info.text_shards)} text "
              f"shards; snapshot {info.snapshot[:16]}")
    return 0


def _saved_config(storage: Storage) -> Path:
    if not isinstance(storage, LocalStorage):
        raise ConfigError(f"give --config: the one of {storage.location} is not a local file")
    if not storage.exists("config.yaml"):
        raise ConfigError(f"{storage.location} has no config.yaml of `grn-scale tokenize`; give --config")
    return storage.path("config.yaml")

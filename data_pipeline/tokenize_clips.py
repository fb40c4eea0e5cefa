"""grn-scale tokenize: a manifest of clips and captions -> token shards with an index (the format: data/schema.py).

    grn-scale tokenize --config configs/runs/demo.yaml data.manifest=clips.jsonl output=tokens/

Three stages: videos, captions, index. A second run makes only what is missing: a chunk of the manifest whose
shard is finished is kept, and a changed caption redoes text shards and the index, never a video shard. Two runs
over the same files give the same bytes.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import write_bytes, write_json
from grn_scale.command_line import CommandParser, run, save_config, start_logging
from grn_scale.config.check import check_output, check_set
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.schema import Config
from grn_scale.data.index_parts import part_path, snapshot_of, write_video_part
from grn_scale.data.manifest import load_manifest
from grn_scale.data.schema import FORMAT_VERSION, DatasetInfo, IndexRow
from grn_scale.data.shards import write_dataset_info
from grn_scale.data_pipeline.chunks import ChunkRecord, Source, VideoSettings, retire_dataset
from grn_scale.data_pipeline.encode_texts import TextStage
from grn_scale.data_pipeline.encode_videos import VideoStage
from grn_scale.data_pipeline.meter import Meter
from grn_scale.errors import ConfigError, UserError
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import load_text_encoder

log = logging.getLogger(__name__)

JOB_FILE = "tokenize.json"
"""Marks a folder as the output of this command, and says what its video shards depend on."""
QUARANTINE_FILE = "quarantine.jsonl"


def tokenize(config: Config, *, retry_quarantined: bool = False) -> dict[str, Any]:
    """Make the dataset that `config` describes in the folder `config.output`; a summary as plain values.

    retry_quarantined: make shards anew that lack a clip whose decoding failed.

    Raises UserError, ConfigError, or DoNotRequeue where more of the manifest is bad than
    `tokenize.max_bad_fraction`; quarantine.jsonl is written in that case too.
    """
    check_set(config, "data.manifest", "output", "text.encoder")
    check_output(config.output)
    clips = load_manifest(config.data.manifest)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(config.tokenizer.path).to(device)
    encoder = load_text_encoder(config.text.encoder, config.text.max_tokens, device)
    _check_model(config, tokenizer.latent_channels, encoder.hidden_size)
    settings = VideoSettings(
        tokenizer=tokenizer.fingerprint, latent_channels=tokenizer.latent_channels, rounds=config.model.rounds,
        fps=config.tokenize.fps, max_frames=config.tokenize.max_frames, latent_side=config.tokenize.latent_side)
    folder = Path(config.output)
    with _own(folder, settings, config), Meter(folder / "status.json") as meter:
        videos = VideoStage(folder, settings, config.tokenize, tokenizer, meter, retry_quarantined)
        try:
            video_records = videos.run(clips)
        finally:
            quarantined = _write_quarantine(folder, videos)
        texts = TextStage(folder, encoder, config.model.task_tags, config.tokenize.batch_clips * 4, meter)
        text_records = texts.run(_wanted_texts(videos.sources, video_records, config.tokenize.shard_samples))
        info = _write_index(folder, config, settings, videos, video_records, texts, text_records)
    return {
        "output": str(folder), "samples": info.samples, "visual_tokens": info.tokens, "captions": texts.texts,
        "video_shards": len(info.video_shards), "text_shards": len(info.text_shards),
        "kept_video_shards": videos.kept, "kept_text_shards": texts.kept,
        "bytes": sum(shard.bytes for shard in (*info.video_shards, *info.text_shards)),
        "manifest_lines": len(clips), "quarantined": dict(sorted(quarantined.items())),
        "duplicate_lines": len(clips) - info.samples - sum(quarantined.values()),
        "snapshot": info.snapshot, "device": device, **meter.status()}


def _check_model(config: Config, latent_channels: int, text_hidden_size: int) -> None:
    """The model section goes with the shards: it must fit tokenizer and text encoder before hours are spent."""
    for field, value, source in (("latent_channels", latent_channels, f"tokenizer {config.tokenizer.path!r}"),
                                 ("text_hidden_size", text_hidden_size, f"text encoder {config.text.encoder!r}")):
        # A class-to-image model reads no text.
        if getattr(config.model, field, value) != value:
            raise ConfigError(f"model.{field} is {getattr(config.model, field)}, but the {source} has {value}; set "
                              f"model.{field}={value}")


@contextmanager
def _own(folder: Path, settings: VideoSettings, config: Config) -> Iterator[None]:
    """The output folder, made or taken up again, for this process alone while the block runs."""
    job = {"about": "output of grn-scale tokenize", "video": dataclasses.asdict(settings),
           "shard_samples": config.tokenize.shard_samples}
    if not (folder / JOB_FILE).is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"output: {folder} is not empty and was not made by `grn-scale tokenize`; give a new "
                            "folder")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        _check_same_job(folder, job)
    for name in ("chunks", "index"):
        (folder / name).mkdir(exist_ok=True)
    with open(folder / "chunks" / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output: another `grn-scale tokenize` is writing to {folder}; wait for it, or give "
                            "another folder") from error
        write_json(folder / JOB_FILE, job)
        save_config(config, folder)
        yield


def _check_same_job(folder: Path, job: dict[str, Any]) -> None:
    try:
        before = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        old = {**before["video"], "shard_samples": before["shard_samples"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / JOB_FILE} cannot be read ({error!r}); give a new output folder") from error
    new = {**job["video"], "shard_samples": job["shard_samples"]}
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"output: {folder} holds shards made with other settings ({'; '.join(changed)}); give a new "
                        "output folder, or the settings as they were")


def _write_quarantine(folder: Path, videos: VideoStage) -> Counter[str]:
    """Write one JSON line for each manifest line that gives no sample; how many there are for each reason."""
    lines, reasons = [], Counter()
    for source in videos.sources:
        problem = source.problem or videos.bad.get(source.key)
        if problem is not None:
            reasons[problem.reason] += 1
            lines.append(json.dumps({"line": source.clip.line, "id": source.clip.id, "path": str(source.clip.path),
                                     "reason": problem.reason, "detail": problem.detail}, ensure_ascii=False) + "\n")
    write_bytes(folder / QUARANTINE_FILE, "".join(lines).encode())
    if lines:
        log.warning("%d of the manifest's lines give no sample (%s); see %s. A later run leaves out what failed to "
                    "decode, unless --retry-quarantined is given", len(lines),
                    ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())),
                    folder / QUARANTINE_FILE)
    return reasons


def _wanted_texts(sources: Sequence[Source], records: Sequence[ChunkRecord], size: int) -> list[list[tuple[int, str]]]:
    """For each chunk the (latent frames, cleaned caption) pairs of its lines that are in the dataset."""
    frames = {row.key: row.thw[0] for record in records for row in record.rows}
    return [[(frames[source.key], text) for source in sources[first : first + size] if source.key in frames
             for _, text in source.captions] for first in range(0, len(sources), size)]


def _write_index(folder: Path, config: Config, settings: VideoSettings, videos: VideoStage,
                 video_records: Sequence[ChunkRecord], texts: TextStage,
                 text_records: Sequence[ChunkRecord]) -> DatasetInfo:
    """Write the index of the video shards, with the captions of all lines a clip stands in, then dataset.json."""
    captions: dict[str, dict[tuple[str, str], None]] = {}
    classes: dict[str, int] = {}
    for source in videos.sources:
        captions.setdefault(source.key, {}).update(dict.fromkeys(source.captions))
        if source.clip.class_id is not None:
            classes.setdefault(source.key, source.clip.class_id)
    video_shards = [record.shard for record in video_records if record.rows]
    text_shards = [record.shard for record in text_records if record.shard.samples]
    if not video_shards:
        raise UserError(f"no line of {config.data.manifest} gives a sample; see {folder / QUARANTINE_FILE}")
    retire_dataset(folder)
    samples = tokens = 0
    with videos.meter.stage("index", len(video_shards)):
        for shard, record in enumerate(record for record in video_records if record.rows):
            rows = [IndexRow(
                shard, samples + i, row.key, row.offset, row.length, row.xxh3, row.thw, row.ratio_key,
                tuple(texts.caption(kind, text, row.thw[0]) for kind, text in captions[row.key]),
                classes.get(row.key)) for i, row in enumerate(record.rows)]
            write_video_part(part_path(folder, record.shard.name), rows)
            samples += len(rows)
            tokens += sum(t * h * w for t, h, w in (row.thw for row in rows))
            videos.meter.advance()
    names = [shard.name for shard in (*video_shards, *text_shards)]
    info = DatasetInfo(
        format_version=FORMAT_VERSION, tokenizer_fingerprint=settings.tokenizer,
        latent_channels=settings.latent_channels, rounds=settings.rounds, text_fingerprint=texts.encoder.fingerprint,
        text_hidden_size=texts.encoder.hidden_size, task_tags=config.model.task_tags, empty_text=texts.empty_text,
        fps=settings.fps, samples=samples, tokens=tokens, video_shards=tuple(video_shards),
        text_shards=tuple(text_shards), snapshot=snapshot_of(folder, names))
    write_dataset_info(folder, info)
    return info


def main(argv: list[str]) -> int:
    """Run `grn-scale tokenize` with its arguments; the exit code."""
    parser = CommandParser(
        "tokenize", "Turn the clips and captions of a manifest into token shards with an index.",
        "grn-scale tokenize --config configs/runs/demo.yaml data.manifest=clips.jsonl output=tokens/", json=True,
        schema=SCHEMAS)
    parser.add_argument("--retry-quarantined", action="store_true",
                        help="decode clips again that failed in an earlier run (their whole shards are made anew)")
    config, options = parser.parse_command(argv)
    start_logging()
    summary = tokenize(config, retry_quarantined=options.retry_quarantined)
    print(json.dumps(summary, indent=1) if options.json else _table(summary))
    return 0


def _table(summary: dict[str, Any]) -> str:
    bad = summary["quarantined"]
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in summary["stage_seconds"].items())
    rows = [
        ("dataset", summary["output"]),
        ("clips", f"{summary['samples']} of {summary['manifest_lines']} manifest lines "
                  f"({summary['duplicate_lines']} duplicate, {sum(bad.values())} quarantined)"),
        *((f"  {reason}", str(count)) for reason, count in bad.items()),
        ("captions", f"{summary['captions']} entries"),
        ("visual tokens", str(summary["visual_tokens"])),
        ("shards", f"{summary['video_shards']} video ({summary['kept_video_shards']} kept), {summary['text_shards']} "
                   f"text ({summary['kept_text_shards']} kept), {summary['bytes'] / 1e6:.1f} MB"),
        ("speed", f"{summary['clips_per_second']:.1f} clips/s, {summary['frames_per_second']:.1f} frames/s on "
                  f"{summary['device']}"),
        ("seconds", seconds),
        ("snapshot", summary["snapshot"])]
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(run(main))

"""grn-scale tokenize: a manifest of clips and captions -> token shards with an index (the format: data/schema.py).

    grn-scale tokenize --config configs/runs/demo.yaml data.manifest=clips.jsonl output=tokens/

The manifest is cut into chunks, and workers make a video and a text shard of each: those of this machine
(tokenize.workers), and those of every other machine that runs the same command, as the tasks of a Slurm array do. They
share nothing but the output folder. A second run makes only what is missing or has changed: a changed caption redoes a
text shard and index parts, never a video shard. Two runs over the same files give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grn_scale.atomic import remove_leftovers
from grn_scale.command_line import CommandParser, config_yaml, run, start_logging
from grn_scale.config.check import check_output, check_set
from grn_scale.config.class_schema import SCHEMAS
from grn_scale.config.schema import Config
from grn_scale.data_pipeline.environment import environment
from grn_scale.data_pipeline.estimate import estimate_texts
from grn_scale.data_pipeline.finish import (
    Finished,
    finish_once,
    finished_before,
    quarantine_unfinished,
    warn_of_quarantined,
)
from grn_scale.data_pipeline.fleet import run_workers
from grn_scale.data_pipeline.fleet_status import fleet_status, shown
from grn_scale.data_pipeline.job import Job, begin_generation, claim_folder, open_job
from grn_scale.data_pipeline.manifest_sample import sample_manifest
from grn_scale.data_pipeline.records import Records
from grn_scale.data_pipeline.retries import ask_for_retry, ask_for_returned, asked_for
from grn_scale.data_pipeline.settings import text_settings, video_settings
from grn_scale.errors import ConfigError
from grn_scale.leases import Leases
from grn_scale.storage import LocalStorage, Storage
from grn_scale.tokenizer import load_tokenizer
from grn_scale.tokenizer.text import TextTokenizer, load_text_tokenizer
from grn_scale.tokenizer.video import VideoTokenizer

log = logging.getLogger(__name__)


def tokenize(config: Config, *, retry_quarantined: bool = False, accept_environment: bool = False) -> dict[str, Any]:
    """Make the dataset that `config` describes in the folder `config.output`; a summary as plain values.

    retry_quarantined: make shards anew that lack a clip whose decoding failed, once for all tasks of a Slurm job
    (see `_command`).
    accept_environment: where finished chunks were made with other libraries or on another device, keep them and make
    the rest here; workers that still run there stop.

    Raises UserError, ConfigError, or DoNotRequeue where more of the manifest is bad than
    `tokenize.max_bad_fraction`; quarantine.jsonl is written in that case too.
    """
    storage, manifest = Storage.of(config.output), Path(config.data.manifest).absolute()
    tokenizer, texts = check_before_start(config)
    clips, lines = sample_manifest(manifest)
    estimate = estimate_texts([clip.captions if clip else () for clip in clips], lines, texts, config.model.task_tags)
    log.info(estimate.describe(config.text))
    video = video_settings(config, tokenizer)
    command = _command()
    states = claim_folder(storage, video, config.tokenize.shard_samples, estimate.chosen(config.text),
                          environment(config.tokenize, _device()), command if accept_environment else None)
    config = replace(config, text=replace(config.text, states=states if config.text.states == "auto" else
                                          config.text.states))
    storage.write_bytes("config.yaml", config_yaml(config).encode())
    log.info("resolved configuration:\n%s", config_yaml(config))
    began = time.time()
    with ExitStack() as stack:
        leases = stack.enter_context(Leases(storage, config.tokenize.lease_seconds))
        job = open_job(storage, manifest, config.tokenize, video, text_settings(config, texts), leases)
        begin_generation(job)
        records = Records(storage)
        records.refresh()
        before = set(records.finished(job.digests))
        ask_for_returned(storage, command, records, before, leases)
        first = retry_quarantined and ask_for_retry(storage, command, before)
        to_retry = asked_for(storage)
        left = sum(name.failed for name in before - to_retry)
        if retry_quarantined and left and not first:
            log.warning("%d clips that failed to decode are not tried again: %s has asked for that before, and one "
                        "Slurm job or array does so once; give --retry-quarantined in another one", left, command)
        done = finished_before(job, records, retry=not before.isdisjoint(to_retry))
        status = fleet_status(job, records)
        while done is None:  # again where files of finished chunks turn out to be missing at the end
            try:
                with shown(job, records, leases, began) as fleet:
                    before &= set(records.finished(job.digests))  # those whose shards are gone have been dropped
                    run_workers(config, _worker_name(), records)
            except BaseException:  # whatever ends the job, also Ctrl-C: what is known of bad lines is written down
                quarantine_unfinished(job, records, leases)
                raise
            done, status = finish_once(job, records, texts, leases), fleet.latest
            _remove_leftovers(storage)
        warn_of_quarantined(job, done.quarantined)
        return _summary(job, done, len(before.intersection(records.finished(job.digests))), status)


def check_before_start(config: Config) -> tuple[VideoTokenizer, TextTokenizer]:
    """Refuse what cannot run, before anything is written; the video tokenizer and the text encoder's tokenizer."""
    check_set(config, "data.manifest", "output", "text.encoder")
    if "://" in config.data.manifest:
        raise ConfigError(f"data.manifest is {config.data.manifest!r}, but manifests and clips are read from files: "
                          "give a path")
    storage = Storage.of(config.output)
    if isinstance(storage, LocalStorage):
        check_output(storage.location)
    tokenizer = load_tokenizer(config.tokenizer.path)
    texts = load_text_tokenizer(config.text.encoder, config.text.max_tokens)
    _check_model(config, tokenizer.latent_channels, texts.hidden_size)
    return tokenizer, texts


def _check_model(config: Config, latent_channels: int, text_hidden_size: int) -> None:
    """The model section goes with the shards: it must fit tokenizer and text encoder before hours are spent."""
    for field, value, source in (("latent_channels", latent_channels, f"tokenizer {config.tokenizer.path!r}"),
                                 ("text_hidden_size", text_hidden_size, f"text encoder {config.text.encoder!r}")):
        # A class-to-image model reads no text.
        if getattr(config.model, field, value) != value:
            raise ConfigError(f"model.{field} is {getattr(config.model, field)}, but the {source} has {value}; set "
                              f"model.{field}={value}")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _command() -> str:
    """Names this command. All tasks of a batch job or array are one, whenever they start, also after a requeue; in an
    interactive allocation, in which people give many commands, those of one srun are, and else each process is."""
    slurm = {name.removeprefix("SLURM_"): value for name, value in os.environ.items() if name.startswith("SLURM_")}
    job = slurm.get("ARRAY_JOB_ID") or slurm.get("JOB_ID")
    if job and ("ARRAY_JOB_ID" in slurm or os.environ.get("ENVIRONMENT") == "BATCH"):  # which Slurm sets for sbatch
        return f"slurm-{job}"
    if job and slurm.get("STEP_NUM_TASKS", "1") != "1":  # a shell in a step of its own (srun --pty) is one task
        return f"slurm-{job}-{slurm.get('STEP_ID')}"
    return uuid.uuid4().hex


def _worker_name() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) + f"-{os.getpid()}"


def _remove_leftovers(storage: Storage) -> None:
    if isinstance(storage, LocalStorage):
        for name in ("", "index", "chunks", "sources", "leases", "workers", "retries"):
            remove_leftovers(storage.path(name))


def _summary(job: Job, done: Finished, kept_chunks: int, status: dict[str, Any]) -> dict[str, Any]:
    info, quarantined = done.info, sum(done.quarantined.values())
    return {
        "output": job.storage.location, "samples": info.samples, "visual_tokens": info.tokens,
        "text_states": info.text_states, "captions": sum(shard.samples for shard in info.text_shards),
        "video_shards": len(info.video_shards), "text_shards": len(info.text_shards), "kept_chunks": kept_chunks,
        "bytes": sum(shard.bytes for shard in (*info.video_shards, *info.text_shards)),
        "manifest_lines": job.lines, "quarantined": dict(sorted(done.quarantined.items())),
        "duplicate_lines": job.lines - info.samples - quarantined,
        "snapshot": info.snapshot, "device": _device(), **status}


def main(argv: list[str]) -> int:
    """Run `grn-scale tokenize` with its arguments; the exit code."""
    config, options = parse_command(argv)
    start_logging()
    summary = tokenize(config, retry_quarantined=options.retry_quarantined,
                       accept_environment=options.accept_environment)
    print(json.dumps(summary, indent=1) if options.json else _table(summary))
    return 0


def parse_command(argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The configuration and the command's own options."""
    parser = CommandParser(
        "tokenize", "Turn the clips and captions of a manifest into token shards with an index. Run it on any number "
        "of machines over one output folder: they share the work.",
        "grn-scale tokenize --config configs/runs/demo.yaml data.manifest=clips.jsonl output=tokens/", json=True,
        schema=SCHEMAS)
    parser.add_argument("--retry-quarantined", action="store_true",
                        help="decode clips again that failed in an earlier run (their whole shards are made anew); "
                        "once for all tasks of a Slurm batch job or array, or of one srun")
    parser.add_argument("--accept-environment", action="store_true",
                        help="go on with other libraries, GPU, CPU or threads than the finished chunks were made with: "
                        "they stay, the rest is made here, and workers of the former environment stop")
    parser.add_argument("--max-bad", type=float, metavar="FRACTION",
                        help="stop with exit code 78 when more of the manifest gives no sample; short for "
                        "tokenize.max_bad_fraction")
    config, options = parser.parse_command(argv)
    if options.max_bad is not None:
        config = replace(config, tokenize=replace(config.tokenize, max_bad_fraction=options.max_bad))
    return config, options


def _table(summary: dict[str, Any]) -> str:
    bad = summary["quarantined"]
    busy = ", ".join(f"{stage} {share:.0%}" for stage, share in summary["occupancy"].items())
    rows = [
        ("dataset", summary["output"]),
        ("clips", f"{summary['samples']} of {summary['manifest_lines']} manifest lines "
                  f"({summary['duplicate_lines']} duplicate, {sum(bad.values())} quarantined)"),
        *((f"  {reason}", str(count)) for reason, count in bad.items()),
        ("texts", f"{summary['captions']} entries, states: {summary['text_states']}"),
        ("visual tokens", str(summary["visual_tokens"])),
        ("shards", f"{summary['video_shards']} video, {summary['text_shards']} text, {summary['bytes'] / 1e6:.1f} MB; "
                   f"{summary['kept_chunks']} of {summary['chunks_in_all']} chunks were there already"),
        ("speed", f"{summary['clips_per_second']:.1f} clips/s, {summary['frames_per_second']:.1f} frames/s on "
                  f"{summary['device']}"),
        ("busy", f"{busy}; bounded by {summary['bottleneck']}" if summary["bottleneck"] else "-"),
        ("snapshot", summary["snapshot"])]
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


if __name__ == "__main__":
    sys.exit(run(main))

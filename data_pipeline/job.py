"""What an output folder is made from: the settings its shards depend on, and the manifest cut into chunks.

    tokenize.json    marks a folder as the output of `grn-scale tokenize`, and says what its video shards depend on:
                     settings, and the environment they are made in
    manifest.json    where each chunk of the manifest starts, with the checksum of its lines
    generation       names the job that is being worked on: manifest, settings and environment
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.config.data_schema import TokenizeConfig
from grn_scale.data.manifest_chunks import ManifestChunk, chunk_manifest
from grn_scale.data_pipeline.chunks import VideoSettings, digest
from grn_scale.data_pipeline.encode_texts import TextSettings
from grn_scale.data_pipeline.environment import Environment, differences
from grn_scale.errors import UserError
from grn_scale.leases import Leases
from grn_scale.storage import LocalStorage, Storage

log = logging.getLogger(__name__)

JOB_FILE = "tokenize.json"
MANIFEST_FILE = "manifest.json"
GENERATION_FILE = "generation"
"""Two jobs that differ in it would undo each other's work."""
SCAN_LEASE = "manifest"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """All that the workers of a fleet must agree on."""

    storage: Storage
    manifest: Path
    chunks: tuple[ManifestChunk, ...]
    video: VideoSettings
    text: TextSettings
    digests: tuple[str, ...]
    """Of each chunk: its lines and the settings."""
    environment: Environment
    """That the folder's shards are made in."""

    @property
    def lines(self) -> int:
        """Manifest lines in all, blank ones left out."""
        return sum(chunk.clips for chunk in self.chunks)

    @property
    def generation(self) -> str:
        """Names the manifest, all settings and the environment of this job."""
        return digest([list(self.digests), dict(self.environment)])

    def check_generation(self) -> None:
        """UserError where a command with another manifest, settings or environment has begun to work in the folder."""
        if self.storage.read(GENERATION_FILE) != self.generation.encode():
            raise UserError("output: another `grn-scale tokenize` with another manifest, other settings or another "
                            f"environment has begun to work in {self.storage.location}; wait for it and start again, "
                            "or give another folder")

    def check_environment(self, current: Environment) -> None:
        """UserError where this process, with the environment `current`, would make other bytes than the job's."""
        _refuse_other(self.storage, self.environment, current)

    def shard_name(self, family: str, number: int, made_from: str, attempt: int, taken: Callable[[str], bool]) -> str:
        """Name of a new shard of a chunk: video-000012.tar at the first attempt (0), with a hash at later ones.

        made_from: digest of what goes into the shard. taken: whether a record or a state of the dataset refers to the
        tar of a name; then it is the next attempt's, so that what anybody may read is never written over.
        """
        names = (f"{family}-{number:06d}{f'-{digest([made_from, later])[:8]}' if later else ''}.tar"
                 for later in itertools.count(attempt))
        return next(name for name in names if not taken(name))


def open_job(storage: Storage, manifest: Path, config: TokenizeConfig, video: VideoSettings, text: TextSettings,
             leases: Leases) -> Job:
    """The job of a folder that `claim_folder` has made sure of. Cuts the manifest where nobody has done so yet.

    Raises ManifestError where the manifest cannot be read or is empty, UserError where tokenize.json cannot.
    """
    environment = _read_job(storage)["environment"]
    chunks = _chunks(storage, manifest, config.shard_samples, leases)
    common = [str(manifest.parent), dataclasses.asdict(video), dataclasses.asdict(text), config.allow_empty_captions]
    digests = tuple(digest([chunk.sha256, *common]) for chunk in chunks)
    return Job(storage, manifest, chunks, video, text, digests, environment)


def begin_generation(job: Job) -> None:
    """From now on workers of other jobs in the folder stop at their next chunk."""
    job.storage.write_bytes(GENERATION_FILE, job.generation.encode())


def claim_folder(storage: Storage, video: VideoSettings, shard_samples: int, text_states: str,
                 environment: Environment, accepted_by: str | None = None) -> str:
    """Make the folder this job's, or take it up again; how text states are stored in it.

    text_states: for a folder that is new. environment: of this process. accepted_by: name of the command that accepts
    another environment than the folder had for what remains to be made; the first of its processes decides for all.
    Raises UserError for a folder with other things in it, and where shards were made with other settings or in another
    environment.
    """
    values = {"about": "output of grn-scale tokenize", "video": dataclasses.asdict(video),
              "shard_samples": shard_samples, "text_states": text_states, "environment": dict(environment)}
    if accepted_by:
        values["accepted_by"] = accepted_by
    if not storage.exists(JOB_FILE):
        if _holds_other_things(storage):
            raise UserError(f"output: {storage.location} is not empty and was not made by `grn-scale tokenize`; give a "
                            "new folder")
        if storage.create(JOB_FILE, _json(values)):
            return text_states
    found = _read_job(storage)
    _check_same(storage, found, values)
    if accepted_by and found.get("accepted_by") != accepted_by:
        _accept(storage, found, environment, accepted_by)
    elif accepted_by and (changed := differences(found["environment"], environment)):
        raise UserError(f"output: {accepted_by} has accepted an environment for {storage.location} already, that of "
                        f"its first process, and this one has another ({changed}); a command, and so all tasks of a "
                        "Slurm job or array, makes its chunks in one: choose machines that are alike, or accept the "
                        "other environment from another Slurm job")
    else:
        _refuse_other(storage, found["environment"], environment)
    return found["text_states"]


def _read_job(storage: Storage) -> dict[str, Any]:
    """What tokenize.json holds; of a folder made before environments were written down, an empty one."""
    try:
        found = json.loads(storage.read(JOB_FILE))
        for name, kind in (("video", dict), ("shard_samples", int), ("text_states", str)):
            if not isinstance(found[name], kind):
                raise TypeError(f"{name} is {found[name]!r}")
        return {**found, "environment": dict(found.get("environment", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{storage / JOB_FILE} cannot be read ({error!r}); give a new output folder") from error


def _json(values: dict[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=1)}\n".encode()


def _refuse_other(storage: Storage, old: Environment, new: Environment) -> None:
    if changed := differences(old, new):
        raise UserError(
            f"output: {storage.location} holds shards made in another environment than this process has ({changed}), "
            "and a chunk must give the same bytes whoever makes it; run where all is as it was, give a new output "
            "folder, or give --accept-environment: then finished chunks stay, and what remains is made in the "
            "environment of the process that gave it first")


def _accept(storage: Storage, found: dict[str, Any], new: Environment, command: str) -> None:
    """Make `new` the folder's environment. Workers of the former one stop, as it is a part of the generation."""
    former = list(found.get("former_environments", ()))
    if changed := differences(found["environment"], new):
        log.warning("%s: what remains is made in another environment (%s)", storage.location, changed)
        former.append(found["environment"])
    storage.write_bytes(JOB_FILE, _json({**found, "environment": dict(new), "accepted_by": command,
                                         "former_environments": former}))


def _holds_other_things(storage: Storage) -> bool:
    # Another process of this job may be writing the file that makes the folder ours.
    names = [name for name in storage.names() if JOB_FILE not in name]
    if isinstance(storage, LocalStorage) and storage.folder.is_dir():
        names += [path.name for path in storage.folder.iterdir() if JOB_FILE not in path.name]
    return bool(names)


def _check_same(storage: Storage, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    old = {**found["video"], "shard_samples": found["shard_samples"]}
    new = {**wanted["video"], "shard_samples": wanted["shard_samples"]}
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    if changed:
        raise UserError(f"output: {storage.location} holds shards made with other settings ({'; '.join(changed)}); "
                        "give a new output folder, or the settings as they were")


def _chunks(storage: Storage, manifest: Path, size: int, leases: Leases) -> tuple[ManifestChunk, ...]:
    """The cut of the manifest as it is now, found in the folder or made by one process for all."""
    while True:
        stamp = _stamp(manifest, size)
        known = _read_cut(storage, stamp)
        if known is not None:
            return known
        if stamp is None or leases.claim(SCAN_LEASE):
            chunks = tuple(chunk_manifest(manifest, size))
            values = {"manifest": stamp, "chunks": [list(dataclasses.astuple(chunk)) for chunk in chunks]}
            storage.write_bytes(MANIFEST_FILE, json.dumps(values).encode())
            leases.release(SCAN_LEASE)
            return chunks
        time.sleep(POLL_SECONDS)


def _stamp(manifest: Path, size: int) -> list[Any] | None:
    try:
        status = manifest.stat()
    except OSError as error:
        log.debug("%s: %s", manifest, error)  # reading it says why, with the remedy
        return None
    return [str(manifest), status.st_size, status.st_mtime_ns, size]


def _read_cut(storage: Storage, stamp: list[Any] | None) -> tuple[ManifestChunk, ...] | None:
    try:
        values = json.loads(storage.read(MANIFEST_FILE))
        if stamp is not None and values["manifest"] == stamp:
            return tuple(ManifestChunk(*chunk) for chunk in values["chunks"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be used (%r): the manifest is cut again", storage / MANIFEST_FILE, error)
    return None

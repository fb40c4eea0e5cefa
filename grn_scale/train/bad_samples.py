"""The record of a run's samples that could not be used: bad_samples.jsonl, and the limit that stops the run.

A line is {"step", "key", "shard", "reason", "unreadable"}, and a sample has one line however often the run is started:
each start reads the file, so that the limit holds for the run and not for a start. (A checkpoint would forget what was
found after it, and every start from it would find that anew.)
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from grn_scale.atomic import append_line, drop_unfinished_line
from grn_scale.checkpoint.ranks import Ranks
from grn_scale.data.loader import BadSample
from grn_scale.errors import DoNotRequeue, UserError

log = logging.getLogger(__name__)

FILE_NAME = "bad_samples.jsonl"


class BadSamples:
    """Keeps what all processes found in all starts of a run. Every process has one; the first has the file.

    folder: run folder. limit: data.bad_sample_limit. skipped: keys that the checkpoint's data state leaves out. They
    count, also in the checkpoint of another run, because they are left out here as well; what else that run found is
    found anew where it is met.

    Raises DoNotRequeue, on every process, where the run has more bad samples than the limit already, or the file holds
    a line that is none of its own; UserError where it cannot be read.
    """

    def __init__(self, folder: Path, limit: int, skipped: Iterable[str], ranks: Ranks) -> None:
        self._path, self._limit, self._ranks = folder / FILE_NAME, limit, ranks
        self._keys = {*skipped, *ranks.first(lambda: _recorded_keys(self._path))}
        self._check_limit("they were found before this start")

    def add(self, step: int, found: Sequence[BadSample]) -> None:
        """Take over what this process found in a step; every process must call, also one that found nothing.

        Raises DoNotRequeue, on every process, where the run now has more bad samples than the limit; UserError where
        the disk is full.
        """
        new = {bad.key: bad for part in self._ranks.all(lambda: list(found)) for bad in part
               if bad.key not in self._keys}
        if not new:
            return
        self._keys.update(new)
        self._ranks.first(lambda: self._write(step, new.values()))
        last = list(new.values())[-1]
        self._check_limit(f"the last is {last.key} in {last.shard}: {last.reason}")

    def _write(self, step: int, bad_samples: Iterable[BadSample]) -> None:
        for bad in bad_samples:
            append_line(self._path, json.dumps({"step": step, **dataclasses.asdict(bad)}))

    def _check_limit(self, latest: str) -> None:
        if len(self._keys) > self._limit:
            raise DoNotRequeue(
                f"{len(self._keys)} samples are corrupt or unreadable, more than data.bad_sample_limit={self._limit}; "
                f"{latest}. They stand in {self._path}, which counts over all starts of the run. Check the dataset "
                "(grn-scale verify) and its storage; then raise the limit, or move that file away to count anew")


def _recorded_keys(path: Path) -> list[str]:
    """Keys of the file's lines, none where there is no file. A last line that a kill or a power cut damaged is cut
    off: another one would follow it."""
    try:
        drop_unfinished_line(path)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        keys = [_key(line) for line in lines]
        if keys and keys[-1] is None:
            log.warning("%s: the last line is damaged and cut off", path)
            os.truncate(path, sum(map(len, lines[:-1])))
            del keys[-1]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; without it the run does not know how many "
                        "samples were bad before") from error
    if None in keys:
        raise DoNotRequeue(f"{path}:{keys.index(None) + 1}: no line of a record of bad samples, so that they cannot be "
                           "counted: mend or remove the line, and start the run again")
    return keys


def _key(line: bytes) -> str | None:
    """Key of the sample that a line is about; None where it is damaged."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    key = values.get("key") if isinstance(values, dict) else None
    return key if isinstance(key, str) else None

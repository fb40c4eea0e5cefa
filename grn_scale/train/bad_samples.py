"""The record of a run's samples that could not be used: bad_samples.jsonl, and the limit that stops the run.

A line is {"step", "key", "shard", "reason", "unreadable"}; a sample is written once an attempt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from grn_scale.atomic import append_line, drop_unfinished_line
from grn_scale.data.loader import BadSample
from grn_scale.errors import DoNotRequeue

FILE_NAME = "bad_samples.jsonl"


class BadSamples:
    """Keeps what all processes found. Every process has one; rank 0's writes the file.

    folder: run folder. limit: data.bad_sample_limit. known: keys that earlier attempts found. gather: value of this
    process -> values of all processes, the same on each.
    """

    def __init__(self, folder: Path, limit: int, known: Iterable[str], gather: Callable[[object], list], *,
                 writes: bool = True) -> None:
        self._path, self._limit, self._gather, self._writes = folder / FILE_NAME, limit, gather, writes
        self._keys = set(known)
        if writes:
            drop_unfinished_line(self._path)

    def add(self, step: int, found: Sequence[BadSample]) -> None:
        """Take over what this process found in a step; every process must call, also one that found nothing.

        Raises DoNotRequeue, on every process, where the run now has more bad samples than the limit.
        """
        new = {bad.key: bad for part in self._gather(list(found)) for bad in part if bad.key not in self._keys}
        if not new:
            return
        self._keys.update(new)
        if self._writes:
            for bad in new.values():
                append_line(self._path, json.dumps({"step": step, **dataclasses.asdict(bad)}))
        if len(self._keys) > self._limit:
            last = list(new.values())[-1]
            raise DoNotRequeue(
                f"{len(self._keys)} samples are corrupt or unreadable, more than data.bad_sample_limit={self._limit}; "
                f"the last is {last.key} in {last.shard}: {last.reason}. All stand in {self._path}. Check the "
                "dataset (grn-scale verify) and its storage, or raise the limit")

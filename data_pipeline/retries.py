"""Which finished chunks are to be made again: lists that a command makes once, for all its processes.

    retries/<command>.json             --retry-quarantined: names of the records that had failed clips when it began
    retries/<command>-returned.json    names of the records with lines whose media files were missing or could not be
                                       read, and were there when it began

The tasks of a Slurm array are one command, and they start at different times: the first one writes the lists. A record
stands for one attempt at its chunk and gives way to one with another name, so nothing is tried twice for one list. All
workers go by the lists, those of other commands too: the next run does what a killed one has left undone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

from grn_scale.data.media_file import Media
from grn_scale.data_pipeline.chunks import HASH_BYTES
from grn_scale.data_pipeline.read_ahead import read_ahead
from grn_scale.data_pipeline.records import PASSING_REASONS, RecordName, Records
from grn_scale.leases import Leases
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "retries/"
LEASE = "returned"
POLL_SECONDS = 0.5


def ask_for_retry(storage: Storage, command: str, finished: Iterable[RecordName]) -> bool:
    """Have those of the finished chunks made again that lack a clip whose decoding failed.

    command: names the command for all its processes. False, and nothing changes, where it has asked before.
    """
    return storage.create(f"{FOLDER}{command}.json", _list(name for name in finished if name.failed))


def ask_for_returned(storage: Storage, command: str, records: Records, finished: Iterable[RecordName],
                     leases: Leases) -> None:
    """Have those of the finished chunks made again whose media files were missing or unreadable and have come back.

    One process of the command looks at these files, several at a time; the others wait for its list. OSError where the
    storage fails.
    """
    passing = sorted(name for name in finished if name.passing)
    file = f"{FOLDER}{command}-returned.json"
    while passing and not storage.exists(file):
        if leases.claim(LEASE):
            looked_at = zip(passing, read_ahead(lambda name: _has_returned(records, name), passing))
            storage.create(file, _list(name for name, returned in looked_at if returned))
            leases.release(LEASE)
        else:
            time.sleep(POLL_SECONDS)


def asked_for(storage: Storage) -> frozenset[str]:
    """Names of the records whose chunks are to be made again; of those that have been, there is no record any more."""
    names: set[str] = set()
    for name in storage.names(FOLDER):
        if not name.endswith(".json"):
            continue  # still being written
        try:
            names.update(json.loads(storage.read(name))["records"])
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be used (%r): what it lists is not tried again; give --retry-quarantined again",
                        storage / name, error)
    return frozenset(names)


def _list(names: Iterable[RecordName]) -> bytes:
    return json.dumps({"records": list(names)}, indent=1).encode()


def _has_returned(records: Records, name: RecordName) -> bool:
    record = records.read(name)
    return record is not None and any(_is_there(line) for line in record.bad if line["reason"] in PASSING_REASONS)


def _is_there(line: Mapping[str, Any]) -> bool:
    """Whether the media file of a line can be had: by the operation that failed when the line was looked at last."""
    try:
        with Media(line["path"], line.get("member")).open() as stream:
            while line["reason"] == "unreadable" and stream.read(HASH_BYTES):
                pass
    except OSError as error:
        log.debug("line %s of the manifest: %s", line["line"], error)
        return False
    return True

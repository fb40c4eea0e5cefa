"""What --retry-quarantined asked for, once a command: lists of chunks that are to be made again.

    retries/<command>.json    names of the records that had failed clips when the command began

The tasks of a Slurm array are one command, and they start at different times: the first one writes the list. A record
stands for one attempt at its chunk and gives way to one with another name, so nothing is tried twice for one list. All
workers go by the lists, those of commands without the option too: the next run does what a killed one has left undone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable

from grn_scale.data_pipeline.records import RecordName
from grn_scale.storage import Storage

log = logging.getLogger(__name__)

FOLDER = "retries/"


def ask_for_retry(storage: Storage, command: str, finished: Iterable[RecordName]) -> bool:
    """Have those of the finished chunks made again that lack a clip whose decoding failed.

    command: names the command for all its processes. False, and nothing changes, where it has asked before.
    """
    names = [name for name in finished if name.failed]
    return storage.create(f"{FOLDER}{command}.json", json.dumps({"records": names}, indent=1).encode())


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

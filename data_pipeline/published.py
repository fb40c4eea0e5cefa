"""Which tars the states of the finished dataset refer to: another command may publish one while a worker lives."""

from __future__ import annotations

import logging
from collections import defaultdict

from grn_scale.data.dataset_info import DATASET_FILE, read_dataset_info, snapshots
from grn_scale.errors import UserError
from grn_scale.storage import Storage

log = logging.getLogger(__name__)


class PublishedTars:
    """The tars of all states of a dataset. Each state is read once, and none before a tar is there that may be one."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._states: set[str] = set()
        self._sizes: dict[str, set[int]] = defaultdict(set)

    def refer_to(self, name: str) -> bool:
        """Whether a state, as they are now, refers to the tar of this name, and it is there whole."""
        try:
            size = self._storage.size(name)
        except FileNotFoundError:
            return False
        self._read_new_states()
        return size in self._sizes[name]

    def _read_new_states(self) -> None:
        for state in set(snapshots(self._storage)) - self._states if self._storage.exists(DATASET_FILE) else ():
            try:
                info = read_dataset_info(self._storage, state)
            except UserError as error:
                log.warning("a former state of the dataset cannot be read, and its shards may be made anew: %s", error)
                continue
            for shard in (*info.video_shards, *info.text_shards):
                self._sizes[shard.name].add(shard.bytes)
            self._states.add(state)

"""Where the nodes of a job meet in the preflight, before torch.distributed could only hang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from grn_scale.slurm.preflight_check import Failed, Limit, Node, Skipped

MEET_SHARE = 0.5
"""Of the time limit, until which the first node waits for the others."""
ANSWER_SHARE = 0.09
"""How much longer the others wait for what the first one says: not all start at the same moment."""
LEAVE_SHARE = 0.92


class Meeting:
    """A store that the first node keeps and all others reach. What the first one says of who is missing holds for all.

    Opening it raises Failed where the store cannot be kept or reached, or a node does not come. No call waits longer
    than it is told to; once a node is missing, further ones raise Skipped or Failed at once.
    """

    def __init__(self, node: Node, address: str, port: int, limit: Limit, records: Path):
        """records: folder in which each node leaves its file."""
        self.node, self._limit = node, limit
        self.missing: tuple[str, ...] = ()
        self.store = self._open(address, port, records)

    def _open(self, address: str, port: int, records: Path) -> dist.TCPStore:
        keeper, keeps = self.node.names[0], self.node.number == 0
        try:
            return dist.TCPStore(address, port, is_master=keeps, wait_for_workers=False,
                                 timeout=timedelta(seconds=self._limit.left(MEET_SHARE)))
        except dist.DistError as error:
            said = _first_line(error)
        if keeps:
            raise Failed(f"cannot listen on port {port} for the other nodes: {said}",
                         "another program has the port; the next start takes another one")
        if not (records / f"{keeper}.json").exists():  # the first thing that a preflight writes
            raise Failed(f"the preflight of {keeper}, where the nodes meet, did not start", nodes=[keeper])
        raise Failed(f"cannot reach {keeper} at {address}:{port}: {said}",
                     "look for a firewall, or a network that this node is not in: all nodes must reach that address")

    def exchange(self, name: str, value: Any, share: float) -> dict[str, Any]:
        """What every node says, by its name; `value` is JSON. Failed naming the nodes that have not said it when this
        share of the limit is gone."""
        self.tell(f"{name}/{self.node.number}", json.dumps(value))
        if self.node.number == 0:
            with self._reached():
                text = json.dumps(self._collect(name, share))
            self.tell(name, text)
        else:
            text = self.hear(name, self._limit.left(share + ANSWER_SHARE))
            if text is None:
                raise self._lost("does not say in time who is there")
        said = json.loads(text)
        self.missing = tuple(each for each in self.node.names if each not in said)
        if self.missing:
            raise Failed(f"{', '.join(self.missing)} did not {'come' if name == 'meet' else 'get so far'}",
                         "see the log, and the preflight's file of that node", self.missing)
        return said

    def tell(self, key: str, text: str) -> None:
        """Set a key of the store."""
        self.check_complete()
        with self._reached():
            self.store.set(key, text)

    def hear(self, key: str, seconds: float) -> str | None:
        """Text of a key of the store, None where nobody has set it after so long."""
        self.check_complete()
        with self._reached():
            return self.store.get(key).decode() if self._wait([key], seconds) else None

    def leave(self) -> None:
        """The last call: nobody goes before all have got here, or the time is up. What a node has sent to another one
        may need both of them until it is there."""
        seconds = self._limit.left(LEAVE_SHARE)
        try:
            self.store.set(f"leave/{self.node.number}", "")
            if self.node.number == 0:
                there = [i for i, name in enumerate(self.node.names) if name not in self.missing]
                self._wait([f"leave/{i}" for i in there], seconds)
                self.store.set("left", "")
                self.store.get("left")  # now the others have been told
            else:
                self._wait(["left"], seconds)
        except dist.DistError:
            return  # the first node has gone: all has been said

    def _collect(self, name: str, share: float) -> dict[str, Any]:
        keys = {f"{name}/{i}": node for i, node in enumerate(self.node.names)}
        if not self._wait(list(keys), self._limit.left(share)):
            keys = {key: node for key, node in keys.items() if self.store.check([key])}
        return {node: json.loads(text) for node, text in zip(keys.values(), self.store.multi_get(list(keys)))}

    def _wait(self, keys: list[str], seconds: float) -> bool:
        try:
            self.store.wait(keys, timedelta(seconds=seconds))
        except dist.DistStoreError:
            return False
        return True

    def check_complete(self) -> None:
        """Skipped where a node is known to be missing: nothing that all must do can be done."""
        if self.missing:
            raise Skipped(f"{', '.join(self.missing)} is missing")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise self._lost(f"no longer answers: {_first_line(error)}") from error

    def _lost(self, how: str) -> Failed:
        keeper = self.node.names[0]
        self.missing = (keeper,)
        return Failed(f"{keeper}, where the nodes meet, {how}", "see the log, and the preflight's file of that node",
                      [keeper])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

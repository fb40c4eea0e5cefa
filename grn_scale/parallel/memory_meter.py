"""How many bytes of tensors live at once, real or fake."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Counts the storages that operations make while it is the innermost mode, until they are freed.

    Bytes are those that tensors ask for; an allocator rounds up and fragments.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes now."""
        self.peak = 0
        """Most bytes since `restart_peak`."""
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def restart_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # a tensor on "meta" has a size and never any memory
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        known, size = self._known.get(key, (None, 0))
        if known is None or known() is None:
            known = weakref.ref(storage, lambda gone: self._forget(key, gone))
        self._known[key] = known, storage.nbytes()
        # storages can be resized
        self.live += storage.nbytes() - size

    def _forget(self, key: int, gone: weakref.ref) -> None:
        known, size = self._known[key]
        # the address may already belong to another storage
        if known is gone:
            del self._known[key]
            self.live -= size


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())

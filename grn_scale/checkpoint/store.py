"""Saves and loads chunk lists through torch.distributed.checkpoint, with planners and storage of our own.

torch's planner collects every rank's plan, tells each what to write or read, and carries errors to all ranks;
what it would put on disk is replaced. Its `.metadata` is a pickle: here the index is JSON. Its files are
pickled tensors: here they are safetensors. Its state dict has one tensor a name and rank: a rank may hold many
boxes of one tensor (the ZeRO fragments of a parameter), so the planners carry the chunks and the state dict
handed to torch is empty.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from grn_scale.checkpoint.box_reader import BoxReader
from grn_scale.checkpoint.chunks import Box, Chunk, check_cover, intersect, narrow
from grn_scale.checkpoint.index import (
    DTYPE_NAMES,
    INDEX_NAME,
    ChunkIndex,
    StoredChunk,
    StoredFile,
    StoredTensor,
    sync_folder,
)
from grn_scale.checkpoint.ranks import Failure, Ranks, raise_failures
from grn_scale.checkpoint.tensor_file import Entry, write_tensor_file
from grn_scale.errors import UserError


def save_chunks(folder: str | Path, chunks: Sequence[Chunk], group: dist.ProcessGroup | None = None) -> ChunkIndex:
    """Write the chunks of all ranks of `group` into `folder` and return the index, which is written last.

    Chunks that several ranks give alike are written once, by the least loaded of them. UserError on every rank
    where the chunks of a tensor leave a hole or overlap, where ranks disagree about its dtype or shape, where
    the folder holds chunks already, or where a rank cannot write. Works without a process group.
    """
    folder, ranks = Path(folder), Ranks(group)
    writer = _Writer(folder, ranks)
    planner = _SavePlanner(chunks)
    _through_torch(ranks, lambda **options: dcp.save({}, storage_writer=writer, planner=planner, **options))
    return ranks.first(lambda: writer.index)


def load_chunks(folder: str | Path, chunks: Sequence[Chunk], group: dist.ProcessGroup | None = None) -> None:
    """Fill the tensors of `chunks` in place from a chunk folder, whatever boxes it was saved in.

    Each rank reads the bytes that it needs and no others. UserError, on every rank and naming the tensors, where one
    asked for is missing, one that is there is asked for by no rank, or global shape or dtype differ.
    """
    _load(Path(folder), chunks, Ranks(group))


def take_chunks(folder: str | Path, index: ChunkIndex, chunks: Sequence[Chunk], group: dist.ProcessGroup | None = None,
                *, partial: bool) -> dict[str, str]:
    """`load_chunks` of the tensors of `index`, whose files lie in `folder`, cast to the dtypes of the chunks.

    Returns name -> reason for each tensor that does not fit, in both directions (missing there, taken by nothing here,
    of another shape, not floating point), on every rank. These chunks stay as they are; without `partial` a UserError
    naming all of them comes instead.
    """
    ranks = Ranks(group)
    planner = _LoadPlanner(chunks, index, cast=True, partial=partial)
    _read(planner, Path(folder), ranks)
    return ranks.first(lambda: planner.misfits)


def load_chunks_alone(folder: str | Path, chunks: Sequence[Chunk]) -> None:
    """`load_chunks` in this process only, also inside a distributed job."""
    _load(Path(folder), chunks, Ranks(alone=True))


def _load(folder: Path, chunks: Sequence[Chunk], ranks: Ranks) -> None:
    index: list[ChunkIndex] = []
    ranks.all(lambda: index.append(ChunkIndex.read(folder)))
    _read(_LoadPlanner(chunks, index[0]), folder, ranks)


def _read(planner: _LoadPlanner, folder: Path, ranks: Ranks) -> None:
    reader = _Reader(folder, planner.index)
    _through_torch(ranks, lambda **options: dcp.load({}, storage_reader=reader, planner=planner, **options))


def _through_torch(ranks: Ranks, call: Callable[..., object]) -> None:
    """Run a torch.distributed.checkpoint call; what failed on any rank is raised on all, as our error."""
    try:
        # Said by torch at each call without a process group, which is a normal case here. Not in a
        # `catch_warnings`: that is no thing for a thread beside training.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        call(process_group=ranks.group, no_dist=not ranks.together)
    except CheckpointException as error:
        raise_failures([Failure.of(rank, cause) for rank, (cause, _) in sorted(error.failures.items())], error)


def _key(name: str, shape: Sequence[int], box: Box) -> str:
    """Name inside the file: the tensor's own where the box is all of it."""
    offset, size = box
    if tuple(size) == tuple(shape):
        return name
    return f"{name}[{','.join(f'{start}:{start + length}' for start, length in zip(offset, size))}]"


class _SavePlanner(SavePlanner):
    """One write item a chunk; the coordinator checks the cover and gives each box to one of its holders."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks

    def set_up_planner(self, state_dict: dict, storage_meta: StorageMeta | None = None,
                       is_coordinator: bool = False) -> None:
        pass  # the chunks came with the constructor

    def create_local_plan(self) -> SavePlan:
        items = []
        for i, chunk in enumerate(self.chunks):
            if chunk.tensor.dtype not in DTYPE_NAMES:
                raise UserError(f"tensor {chunk.name} has dtype {chunk.tensor.dtype}; "
                                f"a checkpoint holds {', '.join(DTYPE_NAMES.values())}")
            if chunk.tensor.numel() == 0 and math.prod(chunk.global_shape):
                continue
            items.append(WriteItem(
                MetadataIndex(chunk.name, chunk.offset, i), WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)),
                    TensorProperties(chunk.tensor.dtype), torch.Size(chunk.global_shape))))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, TensorStorageMetadata] = {}
        holders: dict[tuple[str, Box], dict[int, WriteItem]] = defaultdict(dict)
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                name, data = item.index.fqn, item.tensor_data
                tensor = tensors.setdefault(name, TensorStorageMetadata(data.properties, data.size, []))
                mine, theirs = (data.properties.dtype, tuple(data.size)), (tensor.properties.dtype, tuple(tensor.size))
                if mine != theirs:
                    raise UserError(f"tensor {name}: rank {rank} says {mine[0]} of shape {mine[1]}, "
                                    f"another {theirs[0]} of shape {theirs[1]}; all ranks must agree")
                holders[name, (tuple(data.chunk.offsets), tuple(data.chunk.sizes))].setdefault(rank, item)
        for name, box in holders:
            tensors[name].chunks.append(ChunkStorageMetadata(*map(torch.Size, box)))
        for name, tensor in tensors.items():
            check_cover(name, tuple(tensor.size), [(tuple(c.offsets), tuple(c.sizes)) for c in tensor.chunks])

        def size(key: tuple[str, Box]) -> int:
            return math.prod(key[1][1]) * tensors[key[0]].properties.dtype.itemsize

        load = [0] * len(all_plans)
        items: list[list[WriteItem]] = [[] for _ in all_plans]
        # Boxes with one holder leave no choice; of the others the largest are placed first.
        for key in sorted(holders, key=lambda k: (len(holders[k]) > 1, -size(k), k)):
            rank = min(holders[key], key=lambda r: (load[r], r))
            load[rank] += size(key)
            items[rank].append(holders[key][rank])
        return [replace(plan, items=mine) for plan, mine in zip(all_plans, items)], Metadata(tensors)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self.chunks[write_item.index.index].tensor


class _Writer(StorageWriter):
    """One safetensors file a rank; the coordinator writes the index after all of them."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.folder = folder
        self.ranks = ranks
        self.index: ChunkIndex | None = None

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass  # one writer serves one save

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        if is_coordinator and (self.folder / INDEX_NAME).exists():
            raise UserError(f"{self.folder} holds chunks already; save into a new folder")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan, planner))
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        try:
            # Every rank makes the folder: over a network file system it may not see the other's yet.
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror or error}") from error
        if not plan.items:
            return []
        name = f"rank-{self.ranks.rank:05d}.safetensors"
        entries, stored = [], []
        for item in plan.items:
            data, chunk = item.tensor_data, item.tensor_data.chunk
            box = tuple(chunk.offsets), tuple(chunk.sizes)
            key = _key(item.index.fqn, data.size, box)
            entries.append(Entry(key, data.properties.dtype, box[1], lambda item=item: planner.resolve_data(item)))
            stored.append(StoredChunk(*box, name, key))
        file = write_tensor_file(self.folder / name, entries)
        sync_folder(self.folder)
        return [WriteResult(item.index, math.prod(chunk.size) * entry.dtype.itemsize, (chunk, file))
                for item, entry, chunk in zip(plan.items, entries, stored)]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[StoredChunk]] = defaultdict(list)
        files: dict[str, StoredFile] = {}
        for result in (r for rank in results for r in rank):
            chunk, file = result.storage_data
            chunks[result.index.fqn].append(chunk)
            files[chunk.file] = file
        self.index = ChunkIndex({
            name: StoredTensor(tensor.properties.dtype, tuple(tensor.size),
                               tuple(sorted(chunks[name], key=lambda c: c.offset)))
            for name, tensor in metadata.state_dict_metadata.items()}, files)
        self.index.write(self.folder)
        sync_folder(self.folder)


class _LoadPlanner(LoadPlanner):
    """Read items for every overlap of a wanted box with a stored one.

    Only names travel to the coordinator, which compares them; the items stay on the rank that needs them. cast: stored
    floating-point numbers may have another dtype; partial: what does not fit is left out and noted in `misfits`, on the
    coordinator.
    """

    def __init__(self, chunks: Sequence[Chunk], index: ChunkIndex, *, cast: bool = False,
                 partial: bool = False) -> None:
        self.chunks = chunks
        self.index = index
        self.cast, self.partial = cast, partial
        self.misfits: dict[str, str] = {}
        self.items: list[ReadItem] = []

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        pass  # chunks and index came with the constructor

    def create_local_plan(self) -> LoadPlan:
        asked: dict[str, str] = {}  # name -> why it does not fit, or nothing
        for i, chunk in enumerate(self.chunks):
            stored = self.index.tensors.get(chunk.name)
            misfit = self._misfit(chunk, stored)
            asked[chunk.name] = asked.get(chunk.name) or misfit
            if not misfit:
                self.items += _read_items(i, chunk, stored)
        return LoadPlan([], planner_data=asked)

    def _misfit(self, chunk: Chunk, stored: StoredTensor | None) -> str:
        """Why the stored tensor cannot fill the chunk; empty where it can."""
        if stored is None:
            return "is missing in the checkpoint"
        if stored.shape != chunk.global_shape:
            return f"has shape {chunk.global_shape} here and {stored.shape} there"
        if stored.dtype != chunk.tensor.dtype and not (self.cast and stored.dtype.is_floating_point):
            return (f"is {DTYPE_NAMES.get(chunk.tensor.dtype, chunk.tensor.dtype)} here and "
                    f"{DTYPE_NAMES[stored.dtype]} there")
        return ""

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        found = dict.fromkeys(self.index.tensors, "is in the checkpoint, but nothing here takes it")
        asked: dict[str, str] = {}
        for plan in global_plan:
            for name, misfit in plan.planner_data.items():
                asked[name] = asked.get(name) or misfit
        found.update(asked)
        self.misfits = {name: reason for name, reason in sorted(found.items()) if reason}
        if self.misfits and not self.partial:
            raise UserError("\n  ".join(
                ["the checkpoint does not fit:", *(f"{name} {reason}" for name, reason in self.misfits.items())])
                + ("\ninit.partial=true takes what fits" if self.cast else ""))
        return [LoadPlan([]) for _ in global_plan]

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return LoadPlan(self.items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a chunk folder holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        chunk = self.chunks[read_item.dest_index.index]
        return narrow(chunk.tensor.detach(), read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # resolve_tensor gave a view of the destination


def _read_items(i: int, chunk: Chunk, stored: StoredTensor) -> list[ReadItem]:
    items = []
    for j, source in enumerate(stored.chunks):
        shared = intersect(chunk.box, (source.offset, source.size))
        if shared is None:
            continue
        offset, size = shared

        def inside(base: tuple[int, ...], offset: tuple[int, ...] = offset) -> torch.Size:
            return torch.Size(a - b for a, b in zip(offset, base))

        items.append(ReadItem(LoadItemType.TENSOR, MetadataIndex(chunk.name, chunk.offset, i), inside(chunk.offset),
                              MetadataIndex(chunk.name, source.offset, j), inside(source.offset), torch.Size(size)))
    if sum(math.prod(item.lengths) for item in items) != chunk.tensor.numel():
        raise UserError(f"the index does not cover {chunk.name} at {chunk.offset} of size {chunk.size} exactly once; "
                        "the checkpoint is damaged: take another")
    return items


class _Reader(StorageReader):
    """Reads boxes out of chunk files, each file opened once."""

    def __init__(self, folder: Path, index: ChunkIndex) -> None:
        self.folder = folder
        self.index = index

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass  # one reader serves one load

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def read_metadata(self) -> Metadata:
        return Metadata({name: TensorStorageMetadata(
            TensorProperties(t.dtype), torch.Size(t.shape),
            [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.size)) for c in t.chunks])
            for name, t in self.index.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[tuple[StoredChunk, torch.dtype, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            stored = self.index.tensors[item.storage_index.fqn]
            source = stored.chunks[item.storage_index.index]
            by_file[source.file].append((source, stored.dtype, item))
        for name, items in sorted(by_file.items()):
            path = self.folder / name
            try:
                with BoxReader(path) as file:
                    for source, dtype, item in items:
                        target = planner.resolve_tensor(item)
                        file.read(source.key, item.storage_offsets, target, dtype)
                        planner.commit_tensor(item, target)
            except (OSError, UserError) as error:
                raise UserError(f"cannot read {path}: {error}; the checkpoint is damaged: take another") from error
        done: Future[None] = Future()
        done.set_result(None)
        return done

"""Checkpoints over gloo: one set of four processes runs every case in turn, some in a group of two."""

import json
import multiprocessing
import os
import resource
import signal
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from grn_scale.checkpoint import layout, load_weights
from grn_scale.checkpoint.background import BackgroundSaver
from grn_scale.checkpoint.checkpoint import load_checkpoint, resolve_resume, save_checkpoint
from grn_scale.checkpoint.chunks import Chunk, fragment_boxes, whole
from grn_scale.checkpoint.ranks import RankError, Ranks
from grn_scale.checkpoint.store import load_chunks, save_chunks
from grn_scale.errors import ConfigError, UserError
from tests.helpers.checkpoints import at_event

WORLD = 4
SHAPES = {"blocks.0.w": (8, 6), "blocks.0.conv": (4, 3, 2, 2), "norm.weight": (10,), "scale": ()}


def truth(fill=0.0):
    return {name: (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + fill).reshape(shape).to(
        torch.bfloat16 if name == "norm.weight" else torch.float32) for name, shape in SHAPES.items()}


def split_rows(tensors, rank, size):
    """Tensor-parallel style: rows shared out, vectors and scalars on every rank."""
    chunks = []
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            chunks.append(whole(name, tensor.clone()))
        else:
            rows = tensor.shape[0] // size
            chunks.append(Chunk(name, tensor.shape, (rank * rows, *[0] * (tensor.ndim - 1)),
                                tensor[rank * rows:(rank + 1) * rows].clone()))
    return chunks


def split_columns(tensors, rank, size):
    """As split_rows along dimension 1, uneven."""
    chunks = []
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            chunks.append(whole(name, tensor.clone()))
        else:
            edges = [tensor.shape[1] * r // size for r in range(size + 1)]
            part = tensor[:, edges[rank]:edges[rank + 1]]
            chunks.append(Chunk(name, tensor.shape, (0, edges[rank], *[0] * (tensor.ndim - 2)), part.clone()))
    return chunks


def split_fragments(tensors, rank, size):
    """ZeRO style: all tensors flattened one after the other, and the whole cut into equal ranges."""
    total = sum(t.numel() for t in tensors.values())
    low, high = total * rank // size, total * (rank + 1) // size
    chunks, at = [], 0
    for name, tensor in tensors.items():
        start, end = max(low - at, 0), min(high - at, tensor.numel())
        if end > start:
            fragment = tensor.reshape(-1)[start:end].clone()
            chunks += [Chunk(name, tensor.shape, offset, fragment[i:i + torch.Size(box).numel()].view(box))
                       for offset, box, i in fragment_boxes(tensor.shape, start, end - start)]
        at += tensor.numel()
    return chunks


def expect_filled(split, folder, rank, size, group):
    wanted, got = split(truth(), rank, size), split({n: t * 0 - 1 for n, t in truth().items()}, rank, size)
    load_chunks(folder, got, group)
    for a, b in zip(wanted, got, strict=True):
        assert torch.equal(a.tensor, b.tensor), (split.__name__, a.name, a.offset)


def raises(kind, match, action):
    with pytest.raises(kind, match=match):
        action()


# Each case runs on every rank: (folder of the case, rank, group of the ranks 0 and 1, None elsewhere).

def saved_on_two_loads_on_four_and_one(folder, rank, pair):
    for split in (split_rows, split_columns, split_fragments):
        if rank < 2:
            save_chunks(folder / split.__name__, split(truth(), rank, 2), pair)
        dist.barrier()
        for other in (split_rows, split_columns, split_fragments):
            expect_filled(other, folder / split.__name__, rank, WORLD, None)


def saved_on_four_loads_on_two_and_one(folder, rank, pair):
    for split in (split_rows, split_columns, split_fragments):
        save_chunks(folder / split.__name__, split(truth(), rank, WORLD))
        if rank < 2:
            for other in (split_rows, split_columns, split_fragments):
                expect_filled(other, folder / split.__name__, rank, 2, pair)


def one_rank_alone_reads_the_weights_that_four_saved(folder, rank, pair):
    save_checkpoint(folder, 1, {"model": split_fragments(truth(3), rank, WORLD)}, {}, keep_last=1)
    if rank == 2:
        loaded = load_weights(folder)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in truth(3).items())


def replicas_are_written_once_and_shared_out(folder, rank, pair):
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(8)}
    index = save_chunks(folder / "c", [whole(name, t) for name, t in tensors.items()])
    assert [len(t.chunks) for t in index.tensors.values()] == [1] * 8
    sizes = [(folder / "c" / f"rank-{r:05d}.safetensors").stat().st_size for r in range(WORLD)]
    assert max(sizes) < 1.1 * min(sizes) and sum(sizes) < 1.1 * 8 * 4000, sizes
    assert len(index.files) == WORLD


def a_rank_that_gives_nothing_writes_no_file(folder, rank, pair):
    index = save_chunks(folder / "c", [] if rank else [whole("w", torch.ones(3))])
    assert list(index.files) == ["rank-00000.safetensors"]
    target = [whole("w", torch.zeros(3))] if rank == 3 else []
    load_chunks(folder / "c", target)
    assert all(torch.equal(c.tensor, torch.ones(3)) for c in target)


def a_part_that_no_rank_gives_fails_on_all(folder, rank, pair):
    mine = [] if rank == 1 else split_rows(truth(), rank, WORLD)
    raises(UserError, r"tensor blocks.0.w .*no rank gave the elements at \(2, 0\)",
           lambda: save_chunks(folder / "c", mine))


def a_bad_chunk_on_one_rank_fails_on_all(folder, rank, pair):
    mine = [whole("w", torch.zeros(2, dtype=torch.complex64 if rank == 1 else torch.float32))]
    raises(UserError, "w has dtype torch.complex64",
           lambda: save_checkpoint(folder, 1, {"model": mine}, {}, keep_last=1))
    assert not list(folder.iterdir())


def a_full_disk_on_one_rank_fails_on_all_and_keeps_the_last_checkpoint(folder, rank, pair):
    save_checkpoint(folder, 1, {"model": split_rows(truth(1), rank, WORLD)}, {"step": 1}, keep_last=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    raises(UserError, "(?s)cannot write .*rank-00002.*free space", lambda: save_checkpoint(
        folder, 2, {"model": split_rows(truth(2), rank, WORLD)}, {"step": 2}, keep_last=1))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]


def a_wrong_shape_on_one_rank_fails_the_load_on_all(folder, rank, pair):
    save_chunks(folder / "c", split_rows(truth(), rank, WORLD))
    mine = split_rows(truth(), rank, WORLD)
    if rank == 3:
        mine[0] = whole("blocks.0.w", torch.zeros(2, 2))
    raises(UserError, r"blocks.0.w has shape \(2, 2\) here", lambda: load_chunks(folder / "c", mine))


def an_unreadable_index_fails_the_load_on_all(folder, rank, pair):
    raises(UserError, "metadata.json is missing", lambda: load_chunks(folder if rank else folder / "absent", []))


def a_defect_on_one_rank_fails_on_all_and_leaves_nothing(folder, rank, pair):
    raises(RankError, "rank 0: TypeError", lambda: save_checkpoint(folder, 1, {"model": []}, {1: torch}, keep_last=1))
    raises(RankError, "rank 2: KeyError: 'x'", lambda: Ranks().all(lambda: {}["x"] if rank == 2 else None))
    assert not list(folder.iterdir())


def a_rank_may_lack_a_section(folder, rank, pair):
    sections = {"ema": [whole("w", torch.ones(2))]} if rank == 2 else {}
    path = save_checkpoint(folder, 1, {"model": split_rows(truth(), rank, WORLD), **sections}, {}, keep_last=1)
    target = torch.zeros(2)
    wanted = {"ema": [whole("w", target)]} if rank == 1 else {}
    load_checkpoint(path, {"model": split_rows(truth(), rank, WORLD), **wanted})
    assert target.sum() == (2 if rank == 1 else 0)


def a_checkpoint_of_four_resumes_and_old_ones_go(folder, rank, pair):
    for step in (1, 2, 3):
        sections = {"model": split_rows(truth(step), rank, WORLD), "ema": split_fragments(truth(-step), rank, WORLD)}
        path = save_checkpoint(folder, step, sections, {"step": step}, keep_last=2)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert resolve_resume("auto", folder) == path
    blank = {name: torch.zeros_like(t) for name, t in truth().items()}
    back = {"model": split_columns(blank, rank, WORLD), "ema": split_columns(blank, rank, WORLD)}
    assert load_checkpoint(path, back) == {"step": 3}
    for name, fill in (("model", 3), ("ema", -3)):
        for a, b in zip(back[name], split_columns(truth(fill), rank, WORLD), strict=True):
            assert torch.equal(a.tensor, b.tensor)
    raises(ConfigError, "used before", lambda: resolve_resume("none", folder))


def damage_that_only_one_rank_reads_is_skipped_by_all(folder, rank, pair):
    older = save_checkpoint(folder, 1, {"model": split_rows(truth(1), rank, WORLD)}, {}, keep_last=2)
    newer = save_checkpoint(folder, 2, {"model": split_rows(truth(2), rank, WORLD)}, {}, keep_last=2)
    if rank == 0:
        file = newer / "model" / "rank-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    dist.barrier()
    assert resolve_resume("must", folder) == older
    raises(UserError, "checksum", lambda: resolve_resume(str(newer), folder / "other"))


def a_background_save_leaves_the_main_thread_its_collectives(folder, rank, pair):
    tensors = truth(5)
    with BackgroundSaver(folder, keep_last=1) as saver:
        for step in (1, 2):
            chunks = split_fragments(tensors, rank, WORLD)
            saver.save(step, {"model": chunks}, {"step": step})
            for chunk in chunks:
                chunk.tensor.fill_(-1)
            for i in range(50):
                value = torch.tensor([float(rank + i)])
                dist.all_reduce(value)
                assert value.item() == 6 + 4 * i
    assert resolve_resume("must", folder).name == "step-00000002"
    back = {"model": split_columns(truth(-9), rank, WORLD)}
    assert load_checkpoint(folder / "step-00000002", back) == {"step": 2}
    for a, b in zip(back["model"], split_columns(truth(5), rank, WORLD), strict=True):
        assert torch.equal(a.tensor, b.tensor)


def an_error_in_one_ranks_thread_is_raised_on_all_and_a_later_save_succeeds(folder, rank, pair):
    mine, before = {"model": split_rows(truth(1), rank, WORLD)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    with BackgroundSaver(folder, keep_last=1) as saver:
        if rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        for step in (1, 2):
            saver.save(step, mine, {})
        raises(UserError, "cannot write .*rank-00002.*free space", saver.wait)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        saver.save(3, mine, {})
        saver.wait()
        raises(RankError, "rank 0 and 3 more: TypeError", lambda: saver.save(4, mine, {"x": {1, 2}}))
        raises(UserError, "no host memory", lambda: saver.reserve(1 << 60 if rank == 1 else 8))
    assert [p.name for p in folder.iterdir()] == ["step-00000003"]


def a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint_and_nobody_waits(folder, rank, pair):
    saver = BackgroundSaver(folder, keep_last=1)
    saver.save(1, {"model": split_rows(truth(1), rank, WORLD)}, {})
    saver.wait()
    if rank == WORLD - 1:
        at_event("open", f"rank-{rank:05d}", lambda: os.kill(os.getpid(), signal.SIGKILL))
    saver.save(2, {"model": split_rows(truth(2), rank, WORLD)}, {})
    raises(RuntimeError, "", saver.wait)
    assert layout.newest_complete(folder).name == "step-00000001"


CASES = [
    saved_on_two_loads_on_four_and_one, saved_on_four_loads_on_two_and_one,
    one_rank_alone_reads_the_weights_that_four_saved, replicas_are_written_once_and_shared_out,
    a_rank_that_gives_nothing_writes_no_file, a_part_that_no_rank_gives_fails_on_all,
    a_bad_chunk_on_one_rank_fails_on_all, a_full_disk_on_one_rank_fails_on_all_and_keeps_the_last_checkpoint,
    a_wrong_shape_on_one_rank_fails_the_load_on_all, an_unreadable_index_fails_the_load_on_all,
    a_defect_on_one_rank_fails_on_all_and_leaves_nothing,
    a_rank_may_lack_a_section, a_checkpoint_of_four_resumes_and_old_ones_go,
    damage_that_only_one_rank_reads_is_skipped_by_all,
    a_background_save_leaves_the_main_thread_its_collectives,
    an_error_in_one_ranks_thread_is_raised_on_all_and_a_later_save_succeeds,
    a_rank_that_is_killed_while_it_writes_leaves_the_last_checkpoint_and_nobody_waits,  # last: it ends the processes
]


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD,
                            timeout=timedelta(seconds=60))
    pair = dist.new_group([0, 1])
    for case in CASES:
        place = folder / case.__name__
        place.mkdir(exist_ok=True)
        dist.barrier()
        try:
            case(place, rank, pair if rank < 2 else None)
            outcome = ""
        except Exception:  # recorded, and shown by the test of this case
            outcome = traceback.format_exc()
        (folder / f"{case.__name__}.{rank}.json").write_text(json.dumps(outcome))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_rank, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        if process.is_alive():
            process.kill()
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_checkpoint_over_ranks(outcomes, case):
    alive = WORLD - 1 if case is CASES[-1] else WORLD
    for rank in range(alive):
        record = outcomes / f"{case.__name__}.{rank}.json"
        assert record.exists(), f"rank {rank} did not get through"
        assert json.loads(record.read_text()) == ""

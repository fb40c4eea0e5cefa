"""How long training waits for a checkpoint: written in the training thread, and beside training."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grn_scale.errors import ConfigError, UserError
from grn_scale.perf.measure import repeat, spread, start_torch

if TYPE_CHECKING:
    from grn_scale.checkpoint.chunks import Chunk

PARTS = ("model", "exp_avg", "exp_avg_sq", "ema")
TENSORS = 24
"""Of each part."""
WIDTH = 1024
QUIET_STEPS = 20
MEMORY = Path("/dev/shm")


def bench_checkpoint(megabytes: int, ranks: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds that a synchronous and a background save keep training waiting, in turn, and how much slower steps are
    while the background one is written; on the disk of temporary files and, where there is one, in memory.

    megabytes: state of each of the `ranks` processes (10^6 bytes); threads: of each, 0 shares the cores out. Numbers
    are of the slowest rank.
    """
    if megabytes < 1 or ranks not in (1, 2):
        raise ConfigError(f"--megabytes {megabytes} --ranks {ranks}: give at least 1 megabyte, and 1 or 2 ranks")
    with ExitStack() as stack:
        places = {"disk": Path(tempfile.gettempdir())}
        if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 3e6 * megabytes * ranks:
            places["memory"] = MEMORY
        folders = {name: Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place)))
                   for name, place in places.items()}
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_rank, args=(rank, ranks, folders, megabytes, rounds, threads))
                     for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise UserError("a process of the benchmark failed: its error stands above")
        found = [json.loads((folders["disk"] / f"rank-{rank}.json").read_text(encoding="utf-8"))
                 for rank in range(ranks)]
    return {"ranks": ranks, "megabytes_per_rank": megabytes, "tensors": len(PARTS) * TENSORS,
            **{name: _summary([of_rank[name] for of_rank in found]) for name in places}}


def _rank(rank: int, ranks: int, folders: dict[str, Path], megabytes: int, rounds: int, threads: int) -> None:
    """One process: measures in each folder, and leaves what it found in a file of the first."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    device = start_torch(threads)
    import torch
    import torch.distributed as dist

    home = folders["disk"]
    dist.init_process_group("gloo", init_method=f"file://{home}/store", rank=rank, world_size=ranks)
    sections = _state(rank, ranks, megabytes, str(device))
    weights = torch.randn(512, 512, device=device) / 512**0.5
    activations = torch.randn(1024, 512, device=device)

    def step() -> None:
        """Some products, many small operations, and a word with the other rank: what a training step is made of."""
        value = activations
        for _ in range(4):
            value = torch.tanh(value @ weights)
        small = value[0]
        for _ in range(200):
            small = small * 0.99 + 0.01
        dist.all_reduce(small.sum().cpu())

    found = {name: _rounds(folder / "run", rank, sections, step, rounds) for name, folder in folders.items()}
    (home / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _rounds(run: Path, rank: int, sections: dict[str, list[Chunk]], step: Callable[[], None],
            rounds: int) -> dict[str, Any]:
    """Seconds by name of what is measured, one number a round."""
    import torch.distributed as dist

    from grn_scale.checkpoint.background import BackgroundSaver
    from grn_scale.checkpoint.staging import staging_bytes

    found: dict[str, Any] = {name: [] for name in ("blocking", "stall", "write", "quiet", "during", "steps_during")}

    def saver(background: bool) -> BackgroundSaver:
        # Nothing is rotated out: reading back the new checkpoint, which that takes, would make waiting look longer.
        return BackgroundSaver(run, keep_last=2 * rounds + 1, background=background)

    with saver(False) as waiting, saver(True) as beside:
        found["staging_bytes"] = staging_bytes(sections)
        found["reserve"] = repeat(lambda: beside.reserve(found["staging_bytes"]), 1, warmup=0)[0]

        def synchronous(number: int) -> None:
            waiting.save(number, sections, {})
            found["blocking"].append(waiting.stall_seconds)
            waiting.wait()

        def in_background(number: int) -> None:
            begin, during = time.perf_counter(), []
            beside.save(number, sections, {})
            found["stall"].append(beside.stall_seconds)
            while _any(beside.busy) or not during:  # ranks stop together: a step waits for the other rank's
                during += repeat(step, 1, warmup=0)
            beside.wait()
            found["write"].append(time.perf_counter() - begin)
            found["during"].append(statistics.median(during))
            found["steps_during"].append(len(during))

        kinds = [in_background, synchronous]
        for number in range(rounds):
            found["quiet"].append(statistics.median(repeat(step, QUIET_STEPS)))
            for i, kind in enumerate(kinds):
                dist.barrier()
                kind(2 * number + i + 1)
                _remove(run, rank)
            kinds.reverse()
    return found


def _state(rank: int, ranks: int, megabytes: int, device: str) -> dict[str, list[Chunk]]:
    """Weights, moments and moving average, of which each rank holds a range of rows."""
    import torch

    from grn_scale.checkpoint.chunks import Chunk

    rows = max(1, round(megabytes * 1e6 / (len(PARTS) * TENSORS * WIDTH * 4)))

    def chunks(prefix: str) -> list[Chunk]:
        return [Chunk(f"{prefix}{i}", (rows * ranks, WIDTH), (rows * rank, 0), torch.randn(rows, WIDTH, device=device))
                for i in range(TENSORS)]

    return {"model": chunks(""), "optimizer": chunks("exp_avg/") + chunks("exp_avg_sq/"), "ema": chunks("")}


def _any(flag: bool) -> bool:
    """Whether it holds on any rank."""
    import torch
    import torch.distributed as dist

    shared = torch.tensor(int(flag))
    dist.all_reduce(shared)
    return bool(shared)


def _remove(run: Path, rank: int) -> None:
    """Remove the checkpoints that were measured, so that the disk does not fill up."""
    import torch.distributed as dist

    from grn_scale.checkpoint import layout

    dist.barrier()
    if rank == 0:
        for found in layout.scan(run):
            layout.remove(found.path)
    dist.barrier()


def _summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Spreads over the rounds, of the slowest rank in each."""
    def slowest(name: str) -> list[float]:
        return [max(values) for values in zip(*(found[name] for found in ranks))]

    blocking, stall = slowest("blocking"), slowest("stall")
    quiet, during = slowest("quiet"), slowest("during")
    ratios = [waited / blocked for waited, blocked in zip(stall, blocking)]
    return {
        "synchronous_blocking_seconds": spread(blocking),
        "background_stall_seconds": {"first": float(f"{stall[0]:.4g}"), "later": spread(stall[1:] or stall)},
        "stall_over_blocking": {"first": float(f"{ratios[0]:.4g}"), "later": spread(ratios[1:] or ratios)},
        "background_save_seconds": spread(slowest("write")),
        "step_seconds": {"quiet": spread(quiet), "during_a_save": spread(during),
                         "slowdown": spread([beside / alone for beside, alone in zip(during, quiet)]),
                         "steps_during_a_save": spread(slowest("steps_during"))},
        "staging": {"bytes_per_rank": ranks[0]["staging_bytes"],
                    "allocation_seconds": float(f"{max(found['reserve'] for found in ranks):.4g}")},
    }

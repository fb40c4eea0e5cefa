"""A training run that is saved on one layout and goes on on another."""

from __future__ import annotations

from pathlib import Path

from grn_scale.config.schema import Config
from tests.helpers.parity import PACKS, batches_of_step, rate


def first_part(config: Config, save_at: int, steps: int, folder: str) -> dict:
    """Train all the steps, saving after `save_at` of them; losses and this rank's chunks at the end."""
    return _part(config, 0, save_at, steps, folder)


def second_part(config: Config, first: int, steps: int, folder: str) -> dict:
    """Go on from the checkpoint of `first_part`, which did `first` steps."""
    return _part(config, first, -1, steps, folder)


def _part(config: Config, first: int, save_at: int, steps: int, folder: str) -> dict:
    from megatron.core import parallel_state

    from grn_scale.checkpoint.checkpoint import load_checkpoint, save_checkpoint
    from grn_scale.parallel import groups

    device = groups.start(config.parallel)
    from grn_scale.parallel.engine import TrainEngine

    try:
        engine, losses = TrainEngine(config, device), []
        if first:
            path = Path(folder) / f"step-{first:08d}"
            load_checkpoint(path, engine.restore_chunks(first), groups.host())
            engine.finish_restore()
        rank, size = groups.data_parallel()
        for step in range(first, steps):
            batches = batches_of_step(step, config, range(rank, PACKS, size), part=groups.context_parallel())
            losses.append(engine.train_step(batches, rate(config, step, steps)).sums.loss)
            if step + 1 == save_at:
                save_checkpoint(folder, save_at, engine.state_chunks(), {}, keep_last=1, group=groups.host())
        sections = engine.state_chunks()
        engine.close()
        return {"losses": losses, **{
            name: [(c.name, c.global_shape, c.offset, c.tensor.detach().float().clone().numpy()) for c in chunks]
            for name, chunks in sections.items()}}
    finally:
        parallel_state.destroy_model_parallel()

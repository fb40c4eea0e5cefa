"""A run's state on its way into checkpoints and out of them: weights, optimizer, moving average and data position."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grn_scale import __version__
from grn_scale.checkpoint.background import BackgroundSaver
from grn_scale.checkpoint.checkpoint import load_checkpoint, read_state, section_names
from grn_scale.checkpoint.layout import newest_complete, set_aside
from grn_scale.checkpoint.origin import Origin
from grn_scale.checkpoint.ranks import Ranks
from grn_scale.checkpoint.resume_line import layout_of, resume_line
from grn_scale.checkpoint.staging import staging_bytes
from grn_scale.checkpoint.store import take_chunks
from grn_scale.config.load import to_dict
from grn_scale.config.schema import Config
from grn_scale.data.schema import DatasetInfo
from grn_scale.data.state import DataState
from grn_scale.errors import UserError
from grn_scale.parallel import groups
from grn_scale.train.loop import Position

if TYPE_CHECKING:  # importing it loads megatron-core, which has to wait for `parallel.groups.start`
    from grn_scale.parallel.engine import TrainEngine

log = logging.getLogger(__name__)


def start(engine: TrainEngine, origin: Origin | None, data: DataState, *, partial: bool = False) -> Position:
    """The start of everything, with the origin's weights where there is one. The log names each tensor that was not
    taken, which only `partial` allows (`take_chunks`), and one line says from what the run starts.

    data: where the sample stream begins. The weights are the fp32 masters; the moving average begins with them.
    UserError where no tensor fits.
    """
    if origin is not None:
        model = engine.restore_chunks(0)["model"]
        misfits = take_chunks(origin.folder, origin.index, model, groups.host(), partial=partial)
        taken = len(origin.index.tensors.keys() - misfits.keys())
        if not taken:
            raise UserError(f"init.from: no tensor of {origin.path} fits this model, so that nothing would be taken")
        for name, reason in misfits.items():
            log.info("not taken from %s: %s %s", origin.path.name, name, reason)
        engine.finish_restore(restart_average=True)
        log.info("started from the %s weights of %s%s: %d tensors taken%s; new are optimizer, schedule, data position "
                 "and moving average, at step 0", origin.weights, origin.path,
                 f" (step {origin.state['step']})" if "step" in origin.state else "", taken,
                 f", {len(misfits)} not (each named above)" if misfits else ", all that there are")
    return Position(0, 0, data, 0)


def restore(engine: TrainEngine, checkpoint: Path, data: DataState) -> Position:
    """Where the checkpoint of a run stands, after filling the engine from it. One line of the log says from what, and
    what was left out.

    data: where the sample stream goes on.
    """
    saved, there = read_state(checkpoint), section_names(checkpoint)
    sections = engine.restore_chunks(saved["updates"])
    left_out = [f"{name} (this run keeps none)" for name in there if name not in sections]
    if engine.averages and "ema" not in there:
        left_out.append("ema (the checkpoint holds none: it starts from the weights)")
        sections.pop("ema", None)
    load_checkpoint(checkpoint, sections, groups.host())
    engine.finish_restore(restart_average="ema" not in sections)
    log.info(resume_line(checkpoint, saved, layout_of(engine.config, torch.distributed.get_world_size()), left_out))
    return Position(saved["step"], saved["samples_seen"], data, saved.get("batches", saved["step"]))


def restore_before(saver: BackgroundSaver, engine: TrainEngine, config: Config, step: int) -> int | None:
    """Fill the engine from the run's newest complete checkpoint before `step` and return its own; None where there is
    none. Later checkpoints are set aside: a resume does not take them."""
    saver.wait()
    folder, ranks = Path(config.output), Ranks(groups.host())
    checkpoint = newest_complete(folder, before=step, ranks=ranks)
    if checkpoint is None:
        return None
    ranks.first(lambda: set_aside(folder, step))
    return restore(engine, checkpoint, DataState.from_dict(read_state(checkpoint)["data"])).step


def reserve_host_memory(saver: BackgroundSaver, engine: TrainEngine) -> None:
    """Allocate what background saves need now, so that the first of them does not keep training waiting."""
    sections = engine.state_chunks()
    size = staging_bytes(sections)
    if engine.config.optimizer.name == "adamw" and not sections["optimizer"]:  # both moments come with the first step
        size += 2 * staging_bytes({"model": sections["model"]})
    saver.reserve(size)


def save_state(saver: BackgroundSaver, engine: TrainEngine, info: DatasetInfo, config: Config,
               origin: Mapping[str, Any] | None, position: Position, doubtful: bool) -> float:
    """Save a checkpoint, in the background unless train.background_save is off; samples that any process could not read
    enter the skip list of all. Seconds that the last finished one took to write.

    origin: whose weights the run started from (`Origin.to_dict`). doubtful: the loss is; see `save_checkpoint`.
    """
    data = position.data
    for skip in groups.gather_objects(data.skip):
        data = data.with_skips(skip)
    saver.save(position.step, engine.state_chunks(), {
        "step": position.step, "samples_seen": position.samples_seen, "batches": position.batches,
        "updates": engine.updates,
        "data": data.to_dict(), "config": to_dict(config), "origin": origin,
        "layout": layout_of(config, torch.distributed.get_world_size()),
        "dataset": {"tokenizer_fingerprint": info.tokenizer_fingerprint, "text_fingerprint": info.text_fingerprint,
                    "fps": info.fps},
        "versions": {"grn_scale": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }, doubtful=doubtful)
    return saver.write_seconds

"""Whether and how a run goes on from a checkpoint, by what is written with it; no tensor is read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn_scale.checkpoint.checkpoint import read_state
from grn_scale.checkpoint.layout import scan
from grn_scale.config.load import build, changes, to_dict
from grn_scale.config.schema import Config
from grn_scale.data.state import DataState
from grn_scale.errors import ConfigError

log = logging.getLogger("grn_scale.train")


def goes_on(output: str, resume: str) -> bool:
    """Whether the run goes on from a checkpoint of its own, or of a folder that is named, and so not from init.from."""
    return resume not in ("none", "auto") or resume == "auto" and any(found.sealed for found in scan(Path(output)))


def check_resume(checkpoint: Path, config: Config) -> DataState:
    """Where the checkpoint's sample stream stands.

    ConfigError where the run cannot go on from the checkpoint; other settings that changed are logged.

    The layout of parallelism, the optimizer's numbers and the like may change; the model may not.
    """
    saved = read_state(checkpoint)
    if "data" not in saved:
        raise ConfigError(f"{checkpoint} holds weights alone, from which no run can go on, but a new one can start: "
                          f"give init.from={checkpoint} and an output folder of its own, without --resume")
    if other := model_changes(saved["config"]["model"], config, checkpoint):
        raise ConfigError(f"{checkpoint} is of another model ({'; '.join(other)}): keep the model section as it was, "
                          "or give a new output folder")
    if (name := saved["config"]["optimizer"]["name"]) != config.optimizer.name:
        raise ConfigError(f"optimizer.name is {config.optimizer.name}, but {checkpoint} holds the state of {name}: "
                          f"keep optimizer.name={name}, or start a new run from its weights (init.from={checkpoint})")
    if saved["step"] > config.train.steps:
        raise ConfigError(f"{checkpoint} stands at step {saved['step']}, beyond train.steps={config.train.steps}: "
                          "raise train.steps, or give a new output folder")
    if config.init.from_:
        log.info("init.from=%s is not looked at: the run goes on from %s", config.init.from_, checkpoint)
    now = to_dict(config)
    for key, change in changes({**now, **saved["config"], "model": now["model"]}, now).items():
        log.info("changed since %s: %s %s", checkpoint.name, key, change)
    return DataState.from_dict(saved["data"])


def model_changes(saved: Mapping[str, Any], config: Config, source: Path) -> list[str]:
    """Each key in which the run's model differs from the one `saved` with the weights of `source`, as
    "model.key old -> new". ConfigError where the two are of different kinds."""
    if ("num_classes" in saved) != hasattr(config.model, "num_classes"):
        raise ConfigError(f"{source} is of another kind of model than the configuration (text-to-video against "
                          "class-to-image): give the configuration it was trained with")
    # What an older version did not know yet has its default there.
    then = to_dict(build(type(config.model), saved, "model."))
    return [f"model.{key} {change}" for key, change in changes(then, to_dict(config.model)).items()]

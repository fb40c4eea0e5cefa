"""The class-to-image model of a checkpoint that a command names."""

from __future__ import annotations

import logging

import torch

from grn_scale.class_to_image.load import RAW_WEIGHTS_FILE, load_model
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.config.schema import Config
from grn_scale.sampling.source import Source

log = logging.getLogger(__name__)


def load_trained(source: Source, config: Config, *, raw: bool) -> tuple[ClassGRN, str]:
    """(model in train.precision, on the GPU where there is one, "ema" or "raw"): the moving average of the weights
    where the source has one, unless `raw`."""
    folder = source.checkpoint
    raw_file = folder / RAW_WEIGHTS_FILE  # beside an average in a converted folder
    average = raw_file.is_file() or (folder / "ema").is_dir()
    if not average and not raw:
        log.info("%s keeps no moving average: these are the raw weights", folder)
    if raw and raw_file.is_file():
        model = load_model(raw_file, source.class_model)
    else:
        # A folder's model.safetensors is the average by itself; of a checkpoint it has to be asked for.
        model = load_model(folder, source.class_model, ema=not raw and (folder / "ema").is_dir())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return model.to(device, dtype), "ema" if average and not raw else "raw"

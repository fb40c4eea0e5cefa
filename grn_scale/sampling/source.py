"""The model a checkpoint holds, and whether a tokenizer and a text encoder are those it was trained with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grn_scale.checkpoint.checkpoint import read_state
from grn_scale.checkpoint.weights import find_checkpoint
from grn_scale.errors import UserError
from grn_scale.model import GRN, load_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """A model read from a checkpoint, fp32 on the CPU."""

    model: GRN
    checkpoint: Path
    """The step folder."""
    weights: str
    """ema or raw."""
    state: dict[str, Any]
    """What the training saved beside the weights."""

    @property
    def fps(self) -> float | None:
        """Frames a second of the clips it was trained on, where the checkpoint says."""
        return self.state.get("dataset", {}).get("fps")

    def check_fingerprint(self, part: str, field: str, fingerprint: str) -> None:
        """UserError unless `part` (tokenizer, text), which the config's `field` names, is the training data's."""
        trained = self.state.get("dataset", {}).get(f"{part}_fingerprint")
        if trained is None:
            log.warning("%s does not say which %s its training data was made with: that %s fits is not checked",
                        self.checkpoint, field, field)
        elif trained != fingerprint:
            raise UserError(f"{field}: its fingerprint is {fingerprint[:16]}, but {self.checkpoint} was trained on data made "
                            f"with {trained[:16]}; give the {field} that the dataset was tokenized with")


def open_model(path: str | Path, *, raw: bool) -> TrainedModel:
    """Model of a step folder, or of a run folder's newest complete checkpoint.

    The moving average of the weights is taken where there is one, unless `raw`. UserError where there is no
    checkpoint or it does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"--run: there is no folder {path}; give a run folder or one of its step folders")
    checkpoint = find_checkpoint(path)
    ema = not raw and (checkpoint / "ema").is_dir()
    if not ema and not raw:
        log.info("%s keeps no moving average: sampling from the raw weights", checkpoint)
    return TrainedModel(load_model(checkpoint, ema=ema), checkpoint, "ema" if ema else "raw", read_state(checkpoint))

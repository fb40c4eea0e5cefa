"""Weights in the nesting that official files have (GRN reference, section 8)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grn_scale.checkpoint.stored import StoredWeights
from grn_scale.convert.contents import CLASS_SETS, EMA, RAW, TOKENIZER_SETS, TRAINING_SETS
from grn_scale.convert.kinds import CLASS, TOKENIZER
from grn_scale.convert.torch_file import write_torch_file

log = logging.getLogger(__name__)


def write_official(path: Path, kind: str, sets: Mapping[str, StoredWeights], step: int | None) -> None:
    """Write the sets as the official code loads them.

    A text/video model with one set becomes a flat file, as released, with two a training file. A class-to-image
    file always has its three entries, because the official code asks for all; where a set is missing, the nearest one
    stands there too (stored once).
    """
    state = {name: weights.values_by_name for name, weights in sets.items()}
    content: dict[str, Any]
    if kind == CLASS:
        last = state.get(EMA) or next(iter(state.values()))
        lacking = [entry for name, entry in CLASS_SETS.items() if name not in state]
        if lacking:
            log.info("%s stand%s for the same weights as the others: there is one set fewer",
                     " and ".join(lacking), "s" if len(lacking) == 1 else "")
        content = {entry: state.get(name, last) for name, entry in CLASS_SETS.items()}
    elif kind == TOKENIZER:
        content = {TOKENIZER_SETS[RAW]: next(iter(state.values()))} if len(state) == 1 else {
            entry: state[name] for name, entry in TOKENIZER_SETS.items()}
    elif len(state) == 1:
        content = dict(next(iter(state.values())))
    else:
        trainer = {entry: state[name] for name, entry in TRAINING_SETS.items()}
        content = {"args": {}, "gpt_training": True, "arch": "", "epoch": 0, "iter": step or 0, "g_it": step or 0,
                   "trainer": {"config": {}, **trainer, "gpt_fsdp_opt": None}}
    write_torch_file(path, content)

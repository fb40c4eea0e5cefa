"""Packs of one step, filled with clips of one shape and random labels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from grn_scale.config.schema import Config
from grn_scale.errors import ConfigError
from grn_scale.perf.measure import CAPTION_TOKENS, latent_shape

if TYPE_CHECKING:
    from grn_scale.batch import Pack, Sample


def random_packs(config: Config, frames: int) -> tuple[list[list[Sample]], dict[int, float]]:
    """The samples of each pack of a step, clips of `frames` frames, and the loss weight of each draw.

    ConfigError where not even one clip fits data.token_budget.
    """
    import numpy as np
    import torch

    from grn_scale.batch import Draw, Pack, Sample
    from grn_scale.data.plan import sample_weights

    (t, h, w), ratio_key = latent_shape(dataclasses.replace(config.tokenize, max_frames=frames))
    length, budget = t * h * w + CAPTION_TOKENS + 1, config.data.token_budget
    if length > budget:
        raise ConfigError(f"a clip of the configured size has {length} tokens, but data.token_budget is {budget}: set "
                          f"data.token_budget={-(-length // 128) * 128} or more, or smaller clips "
                          "(tokenize.max_frames, tokenize.latent_side)")
    drawn = np.random.default_rng(config.seed)
    task = "T2V" if t > 1 else "T2I"

    def sample(index: int) -> Sample:
        bits = drawn.integers(0, 256, (t * h * w * config.model.bits_per_token + 7) // 8, dtype=np.uint8)
        states = drawn.standard_normal((CAPTION_TOKENS, config.model.text_hidden_size), np.float32)
        draw = Draw(index, f"clip{index}", index, (t, h, w), ratio_key, task, -1, CAPTION_TOKENS)
        return Sample(draw, bits, torch.from_numpy(states))

    count = budget // length
    packs = [[sample(number * count + i) for i in range(count)] for number in range(config.data.packs_per_step)]
    planned: list[Pack] = [Pack(0, number, tuple(s.draw for s in pack)) for number, pack in enumerate(packs)]
    return packs, sample_weights(planned, config.loss.gamma)

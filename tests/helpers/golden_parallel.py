"""Recorded cases of the reference run by the training engine on one rank of any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from grn_scale.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    ZeroConfig,
)
from tests.helpers.golden import GAMMA, GoldenCase

LR = 100.0
"""SGD without clipping and decay moves each weight by LR * gradient; a large one keeps the digits of the gradient."""


def golden_run_config(model: ModelConfig, budget: int, **parallel: object) -> Config:
    return Config(model=model, data=DataConfig(token_budget=budget), parallel=ParallelConfig(**parallel),
                  optimizer=OptimizerConfig(name="sgd", lr=LR, clip_norm=1e9, weight_decay=0.0, ema_decay=0.0),
                  train=TrainConfig(precision="fp32"), zero=ZeroConfig(stage=1))


def engine_on_golden(config: Config, checkpoint: Path, cases: Sequence[GoldenCase]) -> list[dict]:
    """What this rank makes of each case, starting from the checkpoint as `train init.from=...` does.

    loss: weighted loss of the pack by gamma; and on ranks that hold the head, logits [P, its share of D, K],
    sample_loss and sample_correct [N]. norm: of the gradient; before, after: the weights around one step.
    """
    from megatron.core import parallel_state

    from grn_scale.parallel import groups

    device = groups.start(config.parallel)
    from grn_scale.checkpoint.origin import find_origin
    from grn_scale.checkpoint.ranks import Ranks
    from grn_scale.parallel.engine import TrainEngine
    from grn_scale.train.checkpoints import start

    try:
        engine = TrainEngine(config, device)
        results = []
        for case in cases:
            start(engine, find_origin(str(checkpoint), "raw", Ranks(groups.host())), data=None)
            found = {"loss": {}, "before": _weights(engine)}
            for gamma in sorted(set(GAMMA.values())):
                with _watched_head(found):
                    found["loss"][gamma] = engine.evaluate([case.batch(gamma, config.data.token_budget)]).loss
            batch = case.batch(GAMMA[case.layout], config.data.token_budget)
            found["norm"] = engine.train_step([batch], LR).gradient_norm
            results.append(found | {"after": _weights(engine)})
        return results
    finally:
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def _watched_head(found: dict) -> Iterator[None]:
    """Note the logits that the head's loss comes from. Of two classes it takes the difference of the logits alone;
    both follow from what that is computed of."""
    from grn_scale.parallel import stage

    label_loss, binary_scores, forward = stage.label_loss, stage.binary_scores, stage.ParallelHead.forward

    def watch_loss(scores: torch.Tensor, *rest: torch.Tensor):
        if scores.dim() == 3:
            found["logits"] = scores.numpy()
        return label_loss(scores, *rest)

    def watch_scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        found["logits"] = F.linear(x, weight, bias).unflatten(-1, (-1, 2)).numpy()
        return binary_scores(x, weight, bias)

    def watch_head(head: stage.ParallelHead, *inputs: object):
        loss = forward(head, *inputs)
        found["channels"] = (head.channel_slice.start, head.channel_slice.stop)
        found["sample_loss"], found["sample_correct"] = loss.sample_loss_N.numpy(), loss.sample_correct_N.numpy()
        return loss

    stage.label_loss, stage.binary_scores, stage.ParallelHead.forward = watch_loss, watch_scores, watch_head
    try:
        yield
    finally:
        stage.label_loss, stage.binary_scores, stage.ParallelHead.forward = label_loss, binary_scores, forward


def _weights(engine) -> list[tuple]:
    return [(c.name, c.global_shape, c.offset, c.tensor.detach().clone().numpy())
            for c in engine.state_chunks()["model"]]

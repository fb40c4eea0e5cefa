"""The GRN transformer: mathematics only, no rank, print or device literal."""

from __future__ import annotations

from pathlib import Path

from grn_scale.config.schema import ModelConfig
from grn_scale.model.transformer import GRN, Sample

__all__ = ["GRN", "ModelConfig", "Sample", "build_model", "load_model"]


def build_model(config: ModelConfig, seed: int = 0) -> GRN:
    """Plain torch model with initial weights drawn from the seed, fp32 on the CPU."""
    from grn_scale.model.initialize import initialize

    model = GRN(config)
    initialize(model, seed)
    return model


def load_model(path: str | Path, *, ema: bool = False) -> GRN:
    """Plain torch model in fp32 on the CPU, from a checkpoint folder, a run folder (its newest checkpoint), or a
    Hugging Face style folder of the model or of a pipeline.

    ema: the moving average instead of the raw weights. Raises UserError where it cannot be read or does not fit.
    """
    from grn_scale.checkpoint import load_model_config, load_weights
    from grn_scale.errors import UserError

    model = GRN(load_model_config(path))
    result = model.load_state_dict({k: v.float() for k, v in load_weights(path, ema=ema).items()}, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise UserError(f"{path}: weights do not fit the model: missing {result.missing_keys or 'none'}, "
                        f"unexpected {result.unexpected_keys or 'none'}")
    return model.eval()

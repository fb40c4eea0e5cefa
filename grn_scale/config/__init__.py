"""Configuration: frozen dataclasses as the only schema, YAML and overrides on top, rules between sections."""

from grn_scale.config.load import load_config, to_dict
from grn_scale.config.schema import Config, ModelConfig

__all__ = ["Config", "ModelConfig", "load_config", "to_dict"]

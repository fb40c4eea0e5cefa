"""Class-to-image GRN: one square latent image for a class id.

positions.py fixed tables | model.py network | initialize.py first weights | load.py files |
schedule.py numbers by step | sampler.py from noise to labels
"""

from grn_scale.class_to_image.load import build_model, load_model, save_model
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.sampler import ClassSamples, generate
from grn_scale.class_to_image.schedule import ClassSamplingSettings
from grn_scale.config.class_schema import ClassModelConfig

__all__ = ["ClassGRN", "ClassModelConfig", "ClassSamples", "ClassSamplingSettings", "build_model", "generate",
           "load_model", "save_model"]

"""Class-to-image GRN: one square latent image for a class id.

positions.py fixed tables | model.py network | initialize.py first weights | load.py files |
schedule.py numbers by step | guidance.py both branches | sampler.py from noise to labels |
source.py the model of a checkpoint | sample.py from class ids to picture files | batch.py training batches | flops.py
"""

from grn_scale.class_to_image.load import build_model, load_model, save_model
from grn_scale.class_to_image.model import ClassGRN
from grn_scale.class_to_image.sampler import ClassSamples, generate
from grn_scale.config.class_schema import ClassAdaptiveConfig, ClassModelConfig, ClassSamplingSettings

__all__ = ["ClassAdaptiveConfig", "ClassGRN", "ClassModelConfig", "ClassSamples", "ClassSamplingSettings",
           "build_model", "generate", "load_model", "save_model"]

"""The refinement sampler and what decides its steps."""

from grn_scale.sampling.condition import Condition, SamplingSettings
from grn_scale.sampling.maps import StepMaps
from grn_scale.sampling.pipeline import GRNPipeline, PipelineOutput
from grn_scale.sampling.sampler import Generated, generate

__all__ = ["Condition", "GRNPipeline", "Generated", "PipelineOutput", "SamplingSettings", "StepMaps", "generate"]
